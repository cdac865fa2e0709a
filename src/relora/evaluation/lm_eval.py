"""Scores on the tasks of EleutherAI's lm-evaluation-harness: its own, or those of a folder, with local data.

A task is a YAML file that says which data it takes, how a record is asked and what counts as right
(https://github.com/EleutherAI/lm-evaluation-harness, docs/task_guide.md). What is asked and how it is scored is the
harness's affair alone, so figures compare with those that others publish. With a folder its tasks are known and no
others, and nothing is fetched; without one, those that come with the harness, whose data it fetches from the hub.

Task files can name Python and code of the hub, and their templates are programs. Unless the caller trusts the folder,
files that name any are refused before the harness sees them, and its templates are run in Jinja's sandbox.
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

from relora.errors import ReloraError, UserError
from relora.evaluation.output_folder import check_free, save_scores
from relora.evaluation.perplexity import check_counts, open_scored, scored_length
from relora.files.untrusted import check_folder, inside, read_yaml
from relora.inference.loading import LoadedModel
from relora.messages import first_line, short_name, short_repr
from relora.model.load import quiet_transformers

FORMATS = ("arrow", "csv", "json", "parquet", "text")
"""What `dataset_path` of a task in a folder may be: a kind of local file, rather than something of the hub."""
_CODE_KEYS = ("class", "use_prompt", "hf_evaluate", "unsafe_code", "trust_remote_code")
_TRUST = "read it, and if you trust it give --trust-remote-code"
_FEWSHOT_SEED = 1234
"""The harness's own."""
_RESAMPLINGS = 1000
"""For the standard error of a figure that is no mean."""


@dataclass(frozen=True)
class TaskScore:
    """One figure of a task, or of a group of tasks."""

    task: str
    metric: str
    """With the filter in parentheses, where the answers went through one."""
    value: float
    stderr: float | None
    higher_is_better: bool | None
    """None where the task does not say."""
    examples: int | None
    """None for a group."""
    shots: int | None
    """Examples with their answers before the question."""


def evaluate_tasks(
    model_or_run: str | Path,
    tasks: Sequence[str],
    *,
    adapter: str | None = None,
    tasks_folder: str | Path | None = None,
    limit: int | None = None,
    sequence_length: int | None = None,
    batch: int = 8,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
) -> list[TaskScore]:
    """Score a model on tasks of the harness.

    Args:
        model_or_run: a run folder, a model folder or a hub id.
        tasks: names of tasks, groups or tags.
        adapter: a folder or run whose adapter is used, beside the model that it belongs to.
        tasks_folder: where the task files are; unless given, the tasks of the harness are known.
        limit: at most so many records of each task, from the start.
        sequence_length: by default that of the run, else the model's positions; what is longer loses its beginning.
        batch: requests per forward pass.
        out: a new folder for scores.json and samples.jsonl; unless given, nothing is kept.
        trust_remote_code: run code that comes with the model, or with the task files of `tasks_folder`.

    Raises:
        UserError: no such model, adapter or task, a task file that cannot be used, the extra `eval` is absent, or
            `out` holds something. Nothing was written.
    """
    check_counts(limit=limit, sequence_length=sequence_length, batch=batch)
    if out is not None:
        check_free(Path(out))
    harness = _Harness()
    folder = None if tasks_folder is None else Path(tasks_folder)
    if folder is not None:
        harness.check(folder, trusted=trust_remote_code)
    with _quiet():
        harness.find(tasks, folder)
    finished = open_scored(model_or_run, adapter, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    length = scored_length(finished, sequence_length)
    with _quiet(), harness.templates(sandboxed=folder is not None and not trust_remote_code):
        results = harness.run(finished, tasks, length=length, batch=batch, limit=limit)
    scores = _scores(results)
    if out is not None:
        settings: dict[str, Any] = {"model": str(model_or_run), "adapter": adapter, "tasks_folder": tasks_folder}
        settings |= {"limit": limit, "sequence_length": length, "lm_eval": version("lm_eval")}
        save_scores(Path(out), {**settings, "scores": [asdict(score) for score in scores]}, _samples(results))
    return scores


class _Harness:
    """The library, and the tasks that it knows."""

    def __init__(self) -> None:
        try:
            import lm_eval.utils
            from lm_eval.api.metrics import bypass  # noqa: F401  # fills the registry
            from lm_eval.api.registry import metric_registry
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            missing = str(error.name).partition(".")[0]
            raise UserError(f"tasks need {missing}, which is not installed; run: pip install 'relora[eval]'") from None
        self._lm_eval, self._metrics, self._model, self._manager = lm_eval, metric_registry, HFLM, TaskManager
        self._tasks: Any = None

    def check(self, folder: Path, *, trusted: bool) -> None:
        """`UserError` for a folder that is none, and, unless it is trusted, for a task file that names code."""
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
                waiting += self._included(file)

    def find(self, tasks: Sequence[str], folder: Path | None) -> None:
        """`UserError` unless all tasks are known: of `folder`, or the harness's."""
        self._tasks = self._manager(include_path=folder and str(folder), include_defaults=folder is None)
        known = self._tasks.all_tasks
        if not tasks:
            raise UserError(f"no task given; there are {_some(known)}")
        for name in tasks:
            if name not in known:
                mend = "" if folder is not None else "; for tasks of your own give --tasks-folder"
                raise UserError(f"task {short_name(name)}: not known; there are {_some(known)}{mend}")

    @contextmanager
    def templates(self, *, sandboxed: bool) -> Iterator[None]:
        """Inside, the templates of tasks reach no attribute that leads out of the values that they are given."""
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

    def run(
        self, finished: LoadedModel, tasks: Sequence[str], *, length: int, batch: int, limit: int | None
    ) -> Mapping[str, Any]:
        """What the harness returns."""
        model = self._model(
            pretrained=finished.model,
            tokenizer=finished.tokenizer,
            backend="causal",
            max_length=length,
            batch_size=batch,
        )
        try:
            loaded = self._tasks.load(list(tasks))
            for task in loaded["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(_FEWSHOT_SEED)
            results: Mapping[str, Any] = self._lm_eval.evaluate(
                model, loaded, limit=limit, bootstrap_iters=_RESAMPLINGS
            )
        except (ReloraError, RuntimeError, MemoryError):  # of the model, and of the machine
            raise
        except Exception as error:  # whatever the harness, its data sets and its templates raise about a task
            reason = first_line(str(error)) or type(error).__name__
            raise UserError(f"{', '.join(map(short_name, tasks))}: the harness cannot use it: {reason}") from None
        return results

    def _included(self, file: Path) -> list[Path]:
        """The files that a task file includes; `UserError` for one that names code, or data that are not local."""
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
                included += [inside(file.parent, name) for name in (value if isinstance(value, list) else [value])]
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
    """(key, value) of every mapping at any depth."""
    for inner in tree if isinstance(tree, list) else []:
        yield from _entries(inner)
    for key, value in tree.items() if isinstance(tree, dict) else []:
        yield str(key), value
        yield from _entries(value)


def _some(names: Sequence[str]) -> str:
    some = ", ".join(map(short_name, names[:12]))
    return f"{some}, ... ({len(names):,} in all)" if len(names) > 12 else some or "none"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness logs, and without its progress bars where nobody watches them."""
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
    """The figures of tasks, in the order of the harness: `{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}` of each."""
    scores = []
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{filtered}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=stderr if isinstance(stderr, float) else None,
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    examples=results["n-samples"].get(task, {}).get("effective"),
                    shots=results["n-shot"].get(task),
                )
            )
    return scores


def _samples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked and answered, a record of a task each, with its figures."""
    kept = ("doc_id", "doc", "target", "arguments", "filtered_resps", "filter")
    return [
        {"task": task, **{key: sample[key] for key in (*kept, *sample["metrics"])}}
        for task, samples in results["samples"].items()
        for sample in samples
    ]
