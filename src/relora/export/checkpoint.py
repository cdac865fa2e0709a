"""Any checkpoint of a run -> a plain Hugging Face model folder; a run or a model folder -> a GGUF file."""

import logging
import shutil
from pathlib import Path

from relora.data.tokenizer import load_tokenizer
from relora.errors import UserError
from relora.export.gguf import check_gguf, write_gguf
from relora.lowrank import merge
from relora.model.load import dtype_named, model_folder
from relora.model.save import save_model
from relora.recipes.from_settings import lowrank_of, schedule_of
from relora.recipes.pretraining_inputs import open_configured_model
from relora.runs.folder import open_run
from relora.runs.settings import is_run
from relora.train.checkpoint import Checkpoints
from relora.train.run import restore_weights

_log = logging.getLogger(__name__)


def export(
    run: str | Path,
    *,
    step: int | None = None,
    out: str | Path | None = None,
    dtype: str = "fp32",
    trust_remote_code: bool = False,
) -> Path:
    """Merge the factors of a checkpoint (by default the newest sound one) and write `out`, by default RUN/model-STEP.

    `trust_remote_code` runs code that came with the run's model; what its config.yaml says of it does not count here.

    Raises:
        UserError: not a run folder, no such checkpoint, a damaged one, or `out` holds something else.
    """
    folder, config = open_run(run)
    stored = dtype_named(dtype)
    checkpoints = Checkpoints(folder / "checkpoints")
    if step is not None and step not in checkpoints.steps():
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        raise UserError(f"{folder}: has no checkpoint of step {step}; it has {there}")
    checkpoint, broken = (checkpoints.open(step), []) if step is not None else checkpoints.latest()
    if checkpoint is None:
        raise UserError(f"{broken[0] if broken else folder}: has no sound checkpoint; run `relora pretrain` first")
    for line in broken:
        _log.warning("warning: %s; step %d is used", line, checkpoint.step)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    model = open_configured_model(config, eos_token_id=tokenizer.eos_token_id, trust_remote_code=trust_remote_code)
    restore_weights(model, checkpoint, schedule_of(config), lowrank_of(config), seed=config.seed)
    merge(model)
    out = Path(out) if out is not None else folder / f"model-{checkpoint.step}"
    out.parent.mkdir(parents=True, exist_ok=True)
    return save_model(model, out, tokenizer, stored)


def export_gguf(
    source: str | Path,
    *,
    step: int | None = None,
    out: str | Path | None = None,
    dtype: str = "fp32",
    trust_remote_code: bool = False,
) -> Path:
    """Write a GGUF file from a run's checkpoint, a run's model, a model folder or a hub id; never over another file.

    A run gives RUN/model; with `step`, or before it has one, a checkpoint, which `export` first writes beside `out` for
    a while. `dtype` is one of `GGUF_DTYPES`. By default `out` is RUN/model-DTYPE.gguf, RUN/model-STEP-DTYPE.gguf,
    NAME-DTYPE.gguf beside a model folder NAME, or NAME-DTYPE.gguf here for a hub id OWNER/NAME.

    Raises:
        UserError: what `export` and `write_gguf` refuse, or a `step` of what is no run. Nothing was written.
        RunStopped: the disk is full or refuses the write.
    """
    place, from_run = Path(source), is_run(source)
    if step is not None and not from_run:
        raise UserError(f"--checkpoint {step}: {source} is not a run folder (no config.yaml in it)")
    folder = place / "model" if from_run else model_folder(source)
    out = Path(out) if out is not None else _gguf_file(place, from_run, step, dtype)
    check_gguf(out, dtype)
    if not from_run or (step is None and folder.is_dir()):
        return write_gguf(folder, out, load_tokenizer(str(folder)), dtype)
    scratch = out.with_name(f".{out.name}.model")
    try:
        exported = export(source, step=step, out=scratch, trust_remote_code=trust_remote_code)
        return write_gguf(exported, out, load_tokenizer(str(exported)), dtype)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _gguf_file(place: Path, from_run: bool, step: int | None, dtype: str) -> Path:
    if from_run:
        return place / f"{'model' if step is None else f'model-{step}'}-{dtype}.gguf"
    beside = place.resolve() if place.is_dir() else Path(place.name)
    return beside.with_name(f"{beside.name}-{dtype}.gguf")
