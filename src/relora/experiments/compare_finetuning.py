"""The comparison of fine-tuning methods: one base model, one set of instructions, the same examples in the same order.

Every run has a process of its own, one after another, so that its peak memory is its own. Of the learning rates that
are given for a method, the one with the lowest held-out loss counts; for a fair comparison give every method equally
many. The same call continues an interrupted comparison, because every run in it continues from its checkpoint.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from relora.config import FinetuneConfig, parse_finetune_config
from relora.config.finetuning import PROMPT_LR
from relora.device import peak_memory_bytes
from relora.errors import UserError
from relora.evaluation.instructions import score_records
from relora.evaluation.text_metrics import TextScorer, TextScores
from relora.experiments.rates import rates_by_method
from relora.experiments.results import FinetuningOutcome
from relora.experiments.search import best_rate
from relora.experiments.tables import write_finetuning_files
from relora.planning.model_shape import with_settled_dtype
from relora.processes import RUNS_STOPPED, Call, run_in_processes
from relora.recipes.finetune import train_on
from relora.recipes.finetuning_inputs import gather_finetuning
from relora.recipes.from_settings import form_of
from relora.report.history import read_history

FINETUNING_METHODS = ("full", "lora", "relora", "llama-adapter")
METHODS_WITH_FACTORS = ("lora", "relora")
BATCH = 8
"""Number of prompts that are answered together."""
SHOWN_ANSWERS = 3
"""Number of held-out prompts whose answers are in comparison.json and on the page."""


def candidates_of(methods: str, lr: Sequence[str]) -> dict[str, list[float | None]]:
    """Read the options of the command line into the candidates of `compare_finetuning`.

    Args:
        methods: names separated by commas: `full,lora`.
        lr: values of `--lr`, such as `lora=1e-3,2e-3`; a method without one keeps its default rate (None).

    Raises:
        UserError: no method, or a rate that cannot be read or belongs to no method.
    """
    found: dict[str, list[float | None]] = {name.strip(): [None] for name in methods.split(",") if name.strip()}
    for option in lr:
        method = option.partition("=")[0]
        if method not in found:
            raise UserError(f"--lr {option}: write METHOD=RATE with a method of --methods, e.g. lora=1e-3,2e-3")
    for method, rates in rates_by_method(lr, "lora=1e-3,2e-3").items():
        found[method] = list(rates)
    if not found:
        raise UserError("--methods: give at least one, e.g. full,lora")
    return found


def compare_finetuning(
    config: FinetuneConfig, candidates: Mapping[str, Sequence[float | None]], *, answers: int
) -> list[FinetuningOutcome]:
    """Run every method with every learning rate given for it; return the best run of each, in the order given.

    Args:
        config: the configuration of all runs, except method, learning rate and run folder. Its `output_dir` gets a
            folder for each run, and the comparison as JSON, Markdown and HTML.
        candidates: method -> learning rates; None stands for the method's default.
        answers: number of held-out records that are answered and scored, from the first on.

    Raises:
        UserError: a method or a rate that cannot be used, or what a run refuses.
        RunStopped: a run stopped itself.
        Interrupted: a signal arrived; the run under way stops with a checkpoint.
    """
    if config.task != "instruct":
        raise UserError("compare: only `task: instruct` can be compared")
    for method in candidates:
        if method not in FINETUNING_METHODS:
            raise UserError(f"--methods: `{method}` is none of {', '.join(FINETUNING_METHODS)}")
    config = with_settled_dtype(config)
    TextScorer()  # finds a missing extra before hours of training
    runs = [_run_config(config, method, rate) for method, rates in candidates.items() for rate in rates]
    calls = [Call(run.output_dir, train_and_score, (run, answers)) for run in runs]
    outcomes = run_in_processes(calls, when_stopped=RUNS_STOPPED)
    best = [_best_run([one for one in outcomes if one.method == method]) for method in candidates]
    write_finetuning_files(Path(config.output_dir), best, outcomes)
    return best


def train_and_score(config: FinetuneConfig, answers: int) -> FinetuningOutcome:
    """Train one run to its end, or continue it, and score its answers to the first `answers` held-out records."""
    inputs = gather_finetuning(config)
    result = train_on(config, inputs, quiet=True)
    peak = peak_memory_bytes(inputs.device)
    scores, samples = score_records(
        inputs.model,
        inputs.tokenizer,
        inputs.held_out_records[:answers],
        form_of(config),
        sequence_length=config.data.sequence_length,
        max_new_tokens=config.samples.max_new_tokens,
        batch=BATCH,
        scorer=TextScorer(),
    )
    adapter = result.folder / "adapter"
    left = adapter if adapter.is_dir() else result.folder / "model"
    newest_checkpoint = max((result.folder / "checkpoints").glob("step-*"))
    return FinetuningOutcome(
        method=config.method,
        lr=config.lowrank_lr if config.method in METHODS_WITH_FACTORS else config.optimizer.lr,
        loss=result.evaluation.loss,
        perplexity=result.evaluation.perplexity,
        steps=result.steps,
        tokens=result.tokens,
        trainable_parameters=result.trainable_parameters,
        seconds=read_history(result.folder).step_seconds,
        peak_memory_bytes=peak,
        result_bytes=_size_bytes(left, "*.safetensors"),
        checkpoint_bytes=_size_bytes(newest_checkpoint, "*"),
        scores=TextScores(**{name: getattr(scores, name) for name in TextScores.__dataclass_fields__}),
        answers=tuple(
            {"prompt": sample.prompt, "reference": sample.reference, "answer": sample.answer.text}
            for sample in samples[:SHOWN_ANSWERS]
        ),
    )


def _run_config(config: FinetuneConfig, method: str, rate: float | None) -> FinetuneConfig:
    """Return the configuration of one run: its method, its learning rate and its folder in `output_dir`."""
    key = "lowrank_lr" if method in METHODS_WITH_FACTORS else "lr"
    if rate is None and method == "llama-adapter" and config.method != method:
        rate = PROMPT_LR  # `config` has the default of its own method instead
    tree = config.model_dump(mode="json", exclude_none=True)
    if rate is not None:
        tree["optimizer"][key] = rate
    tree["method"] = method
    tree["output_dir"] = str(Path(config.output_dir) / f"{method}-{tree['optimizer'][key]:g}")
    return parse_finetune_config(tree, source=f"--methods {method}")


def _best_run(outcomes: Sequence[FinetuningOutcome]) -> FinetuningOutcome:
    """Return the run with the lowest held-out loss."""
    by_rate = {one.lr: one for one in outcomes}
    return by_rate[best_rate({rate: one.loss for rate, one in by_rate.items()})]


def _size_bytes(folder: Path, pattern: str) -> int:
    """Return the size of a folder's files whose names match a pattern."""
    return sum(file.stat().st_size for file in folder.glob(pattern))
