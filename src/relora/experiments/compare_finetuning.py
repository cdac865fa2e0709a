"""Fine-tuning methods side by side: one base, one instruction set, the same examples in the same order.

Each method runs in a process of its own, one after another, so that its peak memory is its own; of several learning
rates the one with the lowest held-out loss counts, as many tried for one method as for another if that is asked. A
comparison that was interrupted goes on where it stopped, since every run in it does.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from relora.config import FinetuneConfig, parse_finetune_config
from relora.config.finetuning import PROMPT_LR
from relora.device import peak_memory_bytes
from relora.errors import ReloraError, RunStopped, UserError
from relora.evaluation.instructions import score_records
from relora.evaluation.text_metrics import TextScorer, TextScores
from relora.files.atomic import write_durably
from relora.recipes.finetune import train_on
from relora.recipes.finetuning_inputs import gather_finetuning
from relora.recipes.from_settings import form_of
from relora.report.comparison import markdown, write_comparison
from relora.report.history import read_history

METHODS = ("full", "lora", "relora", "llama-adapter")
RECORD = "comparison.json"
BATCH = 8
"""Prompts answered together."""
SHOWN_ANSWERS = 3


@dataclass(frozen=True)
class Outcome:
    """What one method made of the examples, and what it took."""

    method: str
    lr: float
    """Of the factors, prompts or weights: of what the method trains."""
    loss: float
    """Held out, nats per token of the responses."""
    perplexity: float
    steps: int
    tokens: int
    """Scored in training."""
    trainable_parameters: int
    seconds: float
    """Of training steps."""
    peak_memory_bytes: int
    result_bytes: int
    """Of the adapter or model that is left."""
    checkpoint_bytes: int
    scores: TextScores
    answers: tuple[dict[str, str], ...]
    """Prompt, reference and answer of some held-out records."""


def compare(config: FinetuneConfig, candidates: Mapping[str, Sequence[float | None]], *, answers: int) -> list[Outcome]:
    """Run every method with every learning rate given for it; the best of each method, in the order given.

    Args:
        config: of all runs but for method, rate and folder; its `output_dir` gets a folder for each run, and the
            comparison as JSON, Markdown and HTML.
        candidates: method -> learning rates; None is the method's default.
        answers: held-out records that are answered and scored, from the start.

    Raises:
        UserError: a method or rate that cannot be, or what a run refuses. RunStopped: a run stopped itself.
    """
    if config.task != "instruct":
        raise UserError("compare: only `task: instruct` can be compared")
    for method in candidates:
        if method not in METHODS:
            raise UserError(f"--methods: `{method}` is none of {', '.join(METHODS)}")
    TextScorer()  # a missing extra is found before hours of training
    runs = [run for method, rates in candidates.items() for run in _runs(config, method, rates)]
    outcomes = [_in_own_process(run, answers) for run in runs]
    best = [
        min((one for one in outcomes if one.method == method), key=lambda one: _worst_if_nan(one.loss))
        for method in candidates
    ]
    folder = Path(config.output_dir)
    record = {"best": [asdict(one) for one in best], "all": [asdict(one) for one in outcomes]}
    write_durably(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    rows = finetuning_rows(best)
    write_durably(folder / "comparison.md", markdown(FINETUNING_COLUMNS, rows))
    write_comparison(folder, FINETUNING_COLUMNS, rows, answers=_answers(best))
    return best


FINETUNING_COLUMNS = (
    *("method", "rate", "held-out loss", "of full", "ROUGE-L", "trainable", "seconds", "peak MB"),
    *("result MB", "checkpoint MB"),
)


def _runs(config: FinetuneConfig, method: str, rates: Sequence[float | None]) -> Iterator[FinetuneConfig]:
    for rate in rates:
        tree = config.model_dump(mode="json", exclude_none=True)
        key = "lowrank_lr" if method in ("lora", "relora") else "lr"
        if rate is None and method == "llama-adapter" and config.method != method:
            rate = PROMPT_LR
        if rate is not None:
            tree["optimizer"][key] = rate
        tree["method"] = method
        tree["output_dir"] = str(Path(config.output_dir) / f"{method}-{tree['optimizer'][key]:g}")
        yield parse_finetune_config(tree, source=f"--methods {method}")


def _in_own_process(config: FinetuneConfig, answers: int) -> Outcome:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            found = pool.submit(_outcome, config, answers).result()
        except BrokenProcessPool:
            raise RunStopped(f"{config.output_dir}: its process was ended, as by a lack of memory") from None
    if isinstance(found, Outcome):
        return found
    message, status = found
    raise UserError(message) if status == UserError.exit_status else RunStopped(message)


def _outcome(config: FinetuneConfig, answers: int) -> Outcome | tuple[str, int]:
    """Train, measure and answer; or the message and status of what ended the run."""
    try:
        parts = gather_finetuning(config)
        result = train_on(config, parts, quiet=True)
        peak = peak_memory_bytes(parts.device)
        scores, samples = score_records(
            parts.model,
            parts.tokenizer,
            parts.held_out_records[:answers],
            form_of(config),
            sequence_length=config.data.sequence_length + 1,
            max_new_tokens=config.samples.max_new_tokens,
            batch=BATCH,
            scorer=TextScorer(),
        )
    except ReloraError as error:
        return str(error), error.exit_status
    left = result.folder / ("adapter" if (result.folder / "adapter").is_dir() else "model")
    newest = max((result.folder / "checkpoints").glob("step-*"))
    return Outcome(
        method=config.method,
        lr=config.lowrank_lr if config.method in ("lora", "relora") else config.optimizer.lr,
        loss=result.evaluation.loss,
        perplexity=result.evaluation.perplexity,
        steps=result.steps,
        tokens=result.tokens,
        trainable_parameters=result.trainable_parameters,
        seconds=read_history(result.folder).seconds,
        peak_memory_bytes=peak,
        result_bytes=_bytes(left, "*.safetensors"),
        checkpoint_bytes=_bytes(newest, "*"),
        scores=TextScores(**{name: getattr(scores, name) for name in TextScores.__dataclass_fields__}),
        answers=tuple(
            {"prompt": sample.prompt, "reference": sample.reference, "answer": sample.answer.text}
            for sample in samples[:SHOWN_ANSWERS]
        ),
    )


def finetuning_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The cells of the table under `FINETUNING_COLUMNS`, a row for each method."""
    return [_cells(one, outcomes) for one in outcomes]


def _cells(one: Outcome, all_of_them: Sequence[Outcome]) -> list[str]:
    full = next((other.loss for other in all_of_them if other.method == "full"), None)
    return [
        one.method,
        f"{one.lr:g}",
        f"{one.loss:.4f}",
        "-" if full is None else f"{one.loss / full:.3f}",
        f"{one.scores.rougeL:.1f}",
        f"{one.trainable_parameters:,}",
        f"{one.seconds:,.0f}",
        f"{one.peak_memory_bytes / 1e6:,.0f}",
        f"{one.result_bytes / 1e6:,.2f}",
        f"{one.checkpoint_bytes / 1e6:,.2f}",
    ]


def _answers(outcomes: Sequence[Outcome]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each prompt: the prompt, then the reference and every method's answer."""
    first = outcomes[0].answers
    return [
        (asked["prompt"], [("reference", asked["reference"]), *((o.method, o.answers[n]["answer"]) for o in outcomes)])
        for n, asked in enumerate(first)
    ]


def _bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def _worst_if_nan(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def candidates_of(methods: str, rates: Sequence[str]) -> dict[str, list[Any]]:
    """`full,lora` and `lora=1e-3,2e-3` as a command line has them -> `compare`'s candidates."""
    found: dict[str, list[Any]] = {method.strip(): [None] for method in methods.split(",") if method.strip()}
    for rate in rates:
        method, _, values = rate.partition("=")
        if method not in found:
            raise UserError(f"--lr {rate}: write METHOD=RATE with a method of --methods, e.g. lora=1e-3,2e-3")
        try:
            found[method] = [float(value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"--lr {rate}: write METHOD=RATE, e.g. lora=1e-3,2e-3") from None
    if not found:
        raise UserError("--methods: give at least one, e.g. full,lora")
    return found
