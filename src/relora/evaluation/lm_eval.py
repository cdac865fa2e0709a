"""Scores on tasks of EleutherAI's lm-evaluation-harness: its own tasks, or those of a folder, with local data.

A task is a YAML file that says which data it uses, how a record becomes a question and what counts as right
(https://github.com/EleutherAI/lm-evaluation-harness, docs/task_guide.md). Questions and scoring are left to the harness
alone, so the figures compare with published ones. If a folder is given, only its tasks are known and nothing is
downloaded; otherwise the tasks that come with the harness are known, and it downloads their data from the hub.

Task files can name Python code and code on the hub, and their templates are programs. Unless the caller trusts the
folder, task files that name code are refused before the harness reads them, and templates run in Jinja's sandbox.
"""

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from relora.data.tokenizer import vocabulary_size
from relora.errors import ReloraError, UserError
from relora.evaluation.output_folder import check_free, save_scores
from relora.evaluation.scored_model import BATCH, check_counts, open_scored_model, scored_length
from relora.files.untrusted import check_folder, inside, read_yaml
from relora.inference.loading import LoadedModel
from relora.messages import first_line, short_name, short_repr
from relora.model.load import quiet_transformers

_log = logging.getLogger(__name__)

FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""Permitted values of `dataset_path` in a task file: kinds of local files. Other values name data sets on the hub."""
_CODE_KEYS = ("class", "use_prompt", "hf_evaluate", "unsafe_code", "trust_remote_code")
"""Keys of a task file that make the harness run code."""
_TRUST = "read it, and if you trust it give --trust-remote-code"
"""The way out that is named whenever a task file is refused."""
_FEWSHOT_SEED = 1234
"""Seed for drawing the examples before a question; the harness's own default."""
_RESAMPLINGS = 1000
"""Number of bootstrap resamplings, from which the harness takes the standard error of figures that are not means."""
_MOST_NAMES_SHOWN = 12
"""Names of known tasks that an error message lists at most."""


@dataclass(frozen=True)
class TaskScore:
    """One figure of a task, or of a group of tasks."""

    task: str
    metric: str
    """Name of the metric, followed by the harness's filter in parentheses if the answers went through one."""
    value: float
    stderr: float | None
    higher_is_better: bool | None
    """None if the task does not say."""
    examples: int | None
    """Number of scored records; None for a group."""
    shots: int | None
    """Number of examples with their answers that precede each question."""


def evaluate_tasks(
    model_or_run: str | Path,
    tasks: Sequence[str],
    *,
    adapter: str | None = None,
    tasks_folder: str | Path | None = None,
    limit: int | None = None,
    sequence_length: int | None = None,
    batch: int = BATCH,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
) -> list[TaskScore]:
    """Score a model on tasks of the harness.

    Args:
        model_or_run: a run folder, a model folder or a hub id.
        tasks: names of tasks, groups or tags.
        adapter: a folder or run whose adapter is used with the model.
        tasks_folder: folder of task files; by default the tasks of the harness are known.
        limit: use at most so many records of each task, from the start.
        sequence_length: longest request, in tokens; by default that of the run, else the model's positions. A longer
            request loses its beginning.
        batch: requests per forward pass.
        out: a new folder for scores.json and samples.jsonl; by default nothing is written.
        trust_remote_code: run code that comes with the model or with the task files of `tasks_folder`.

    Returns:
        The figures of all tasks, in the order of the harness.

    Raises:
        UserError: the model, the adapter or a task does not exist, a task file cannot be used, the extra `eval` is not
            installed, or `out` exists. Nothing was written.
    """
    check_counts(limit=limit, sequence_length=sequence_length, batch=batch)
    if out is not None:
        check_free(Path(out))
    harness = _Harness()
    folder = None if tasks_folder is None else Path(tasks_folder)
    if folder is not None:
        harness.check_folder(folder, trusted=trust_remote_code)
    with _quiet():
        harness.find_tasks(tasks, folder)
    loaded = open_scored_model(model_or_run, adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    length = scored_length(loaded, sequence_length)
    is_sandboxed = folder is not None and not trust_remote_code
    with _quiet(), harness.template_environment(sandboxed=is_sandboxed):
        results = harness.evaluate(loaded, tasks, length=length, batch=batch, limit=limit)
    if harness.cut:
        _log.warning(
            "warning: %s of %s requests are, with their answers, longer than %s tokens and lost their beginning",
            *(f"{number:,}" for number in (harness.cut, harness.requests, length)),
        )
    scores = _scores(results)
    if out is not None:
        settings: dict[str, Any] = {"model": str(model_or_run), "adapter": adapter, "tasks_folder": tasks_folder}
        settings |= {"limit": limit, "sequence_length": length, "lm_eval": version("lm_eval")}
        save_scores(Path(out), {**settings, "scores": [asdict(score) for score in scores]}, _samples(results))
    return scores


class _Harness:
    """The library lm-evaluation-harness, and the tasks that `find_tasks` made it read.

    Raises:
        UserError: the extra `eval` is not installed.
    """

    def __init__(self) -> None:
        try:
            import lm_eval.utils
            from lm_eval.api.metrics import bypass  # noqa: F401  # importing it fills the registry of metrics
            from lm_eval.api.registry import metric_registry
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            missing = str(error.name).partition(".")[0]
            raise UserError(f"tasks need {missing}, which is not installed; run: pip install 'relora[eval]'") from None
        self._lm_eval, self._metrics = lm_eval, metric_registry
        self._model_class, self._manager_class = HFLM, TaskManager
        self._tasks: Any = None
        self.requests, self.cut = 0, 0
        """Number of requests of the last evaluation, and of those that were too long for the model."""

    def check_folder(self, folder: Path, *, trusted: bool) -> None:
        """Raise `UserError` if a folder has no task files or, unless it is trusted, if one of them names code."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of task files")
        waiting = sorted(folder.rglob("*.yaml"))
        if not waiting:
            raise UserError(f"{folder}: no task file in it (.yaml)")
        if trusted:
            return
        check_folder(folder)
        seen = set()
        while waiting:
            file = waiting.pop()
            if file not in seen:
                seen.add(file)
                waiting += self._check_file(file)

    def find_tasks(self, tasks: Sequence[str], folder: Path | None) -> None:
        """Read the task files of `folder`, or those of the harness; raise `UserError` if one of `tasks` is missing."""
        self._tasks = self._manager_class(include_path=folder and str(folder), include_defaults=folder is None)
        known = self._tasks.all_tasks
        if not tasks:
            raise UserError(f"no task given; there are {_first_names(known)}")
        for name in tasks:
            if name not in known:
                mend = "" if folder is not None else "; for tasks of your own give --tasks-folder"
                raise UserError(f"task {short_name(name)}: not known; there are {_first_names(known)}{mend}")

    @contextmanager
    def template_environment(self, *, sandboxed: bool) -> Iterator[None]:
        """Run the templates of tasks in Jinja's sandbox inside the context, if `sandboxed`.

        In the sandbox a template can neither change the values that it is given nor reach attributes that lead to
        Python's internals.
        """
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        plain = self._lm_eval.utils.env
        if sandboxed:
            safe = ImmutableSandboxedEnvironment(
                undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
            )
            safe.filters.update(plain.filters)
            self._lm_eval.utils.env = safe
        try:
            yield
        finally:
            self._lm_eval.utils.env = plain

    def evaluate(
        self, loaded: LoadedModel, tasks: Sequence[str], *, length: int, batch: int, limit: int | None
    ) -> Mapping[str, Any]:
        """Run the harness and return its results as they are; an error about a task becomes a `UserError`."""
        model = self._model_class(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            max_length=length,
            batch_size=batch,
        )
        try:
            found = self._tasks.load(list(tasks))
            for task in found["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(_FEWSHOT_SEED)
            results: Mapping[str, Any] = self._lm_eval.evaluate(model, found, limit=limit, bootstrap_iters=_RESAMPLINGS)
        except (ReloraError, RuntimeError, MemoryError):  # errors of the model and of the machine
            raise
        except IndexError as error:
            rows, ids = loaded.model.get_input_embeddings().num_embeddings, vocabulary_size(loaded.tokenizer)
            if ids > rows:
                raise UserError(
                    f"the tokenizer has {ids:,} ids and the model {rows:,}; they do not belong together"
                ) from None
            raise self._unusable(tasks, error) from None
        except Exception as error:  # whatever the harness, its data sets and its templates raise about a task
            raise self._unusable(tasks, error) from None
        requests = [(model, request) for sample in _all_samples(results) for request in sample["arguments"]]
        self.requests, self.cut = len(requests), sum(_is_cut(*each, length) for each in requests)
        return results

    def _unusable(self, tasks: Sequence[str], error: Exception) -> UserError:
        """Return the error for tasks that made the harness raise `error`."""
        reason = first_line(str(error)) or type(error).__name__
        return UserError(f"{', '.join(map(short_name, tasks))}: the harness cannot use it: {reason}")

    def _check_file(self, file: Path) -> list[Path]:
        """Return the files that a task file includes; raise `UserError` if it names code, or data that are not local.

        Only the file itself is checked; the caller has to check the included ones, too.
        """
        try:
            tree = read_yaml(file)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        except UserError:
            if b"!function" in file.read_bytes():
                raise UserError(f"{file}: `!function` asks for code, which is not run; {_TRUST}") from None
            raise
        included = []
        for key, value in _entries(tree):
            if key == "include":
                names = value if isinstance(value, list) else [value]
                included += [inside(file.parent, name) for name in names]
            elif key in _CODE_KEYS and value:
                raise UserError(f"{file}: `{key}` asks for code, which is not run; {_TRUST}")
            elif key == "metric" and value not in self._metrics:
                raise UserError(f"{file}: `metric` {short_repr(value)} is none of the harness's own; {_TRUST}")
            elif key == "dataset_path" and value not in FORMATS:
                raise UserError(f"{file}: `dataset_path` {short_repr(value)} is none of {', '.join(FORMATS)}; {_TRUST}")
            elif key == "dataset_kwargs" and "://" in str(value):
                raise UserError(f"{file}: `dataset_kwargs` names a web address; {_TRUST}")
        return included


def _entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of every entry of every mapping in a YAML tree, at any depth."""
    if isinstance(tree, list):
        for item in tree:
            yield from _entries(item)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield str(key), value
            yield from _entries(value)


def _first_names(names: Sequence[str]) -> str:
    """Join names for a message; of many names only the first ones are shown, with the number of all."""
    if not names:
        return "none"
    shown = ", ".join(map(short_name, names[:_MOST_NAMES_SHOWN]))
    return f"{shown}, ... ({len(names):,} in all)" if len(names) > _MOST_NAMES_SHOWN else shown


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's log inside the context and, if standard error is no terminal, its progress bars."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        stack.callback(log.setLevel, level)
        stack.enter_context(quiet_transformers())
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def _scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """Collect the figures of all tasks, in the order of the harness.

    The harness's figures of a task are a mapping such as `{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}`; a key is
    the metric and the filter.
    """
    scores = []
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, answer_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{answer_filter}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if answer_filter == "none" else f"{metric} ({answer_filter})",
                    value=float(value),
                    stderr=stderr if isinstance(stderr, float) else None,
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    examples=results["n-samples"].get(task, {}).get("effective"),
                    shots=results["n-shot"].get(task),
                )
            )
    return scores


def _all_samples(results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the harness's record of every question of every task."""
    for samples in results["samples"].values():
        yield from samples


def _is_cut(model: Any, request: Sequence[Any], length: int) -> bool:
    """Tell whether the harness's model shortened a request, which it does at the beginning.

    Args:
        request: a context and the continuation whose likelihood is asked for, or the settings of a generation; one text
            alone is scored in windows, as a whole.
        length: most tokens that the model is given.
    """
    if len(request) < 2:
        return False
    context, asked = request[0], request[1]
    if isinstance(asked, str):
        return len(model.tok_encode(context + asked)) > length + 1  # the last token is not given to the model
    most = asked.get("max_gen_toks", model.max_gen_toks) if isinstance(asked, Mapping) else 0
    return len(model.tok_encode(context)) > length - most


def _samples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return an object of samples.jsonl for every record of every task: question, answers and figures."""
    kept = ("doc_id", "doc", "target", "arguments", "filtered_resps", "filter")
    return [
        {"task": task, **{key: sample[key] for key in (*kept, *sample["metrics"])}}
        for task, samples in results["samples"].items()
        for sample in samples
    ]
