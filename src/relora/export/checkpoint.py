"""Export of a run's checkpoint as a plain Hugging Face model folder, and of a run or model folder as a GGUF file."""

import logging
import shutil
from pathlib import Path

from relora.data.tokenizer import load_tokenizer, vocabulary_size
from relora.errors import UserError
from relora.export.gguf import check_gguf, write_gguf
from relora.files.untrusted import read_json
from relora.lowrank import merge
from relora.lowrank.usage import usage_of
from relora.model.load import dtype_named, model_folder
from relora.model.save import save_model
from relora.model.vocabulary import grow_vocabulary
from relora.recipes.from_settings import lowrank_of, schedule_of
from relora.recipes.pretraining_inputs import open_configured_model
from relora.runs.folder import open_run
from relora.runs.settings import is_run, read_run_settings, run_folder
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
    """Write a checkpoint of a run as a Hugging Face model folder, with its factors merged into the weights.

    Args:
        run: the run folder.
        step: step of the checkpoint; by default the newest one that is not damaged.
        out: folder to write, by default RUN/model-STEP; a model folder in its place is replaced.
        dtype: dtype of the stored weights, one of `relora.model.load.DTYPES`.
        trust_remote_code: run code that came with the run's model. The key of this name in the run's config.yaml has no
            effect here.

    Returns:
        The folder written.

    Raises:
        UserError: `run` is not the folder of a pretraining run, there is no such checkpoint, it is damaged,
            there is no such dtype, or `out` holds something other than a model.
        RunStopped: the disk is full or refuses the write.
    """
    _check_pretraining(run_folder(run))
    folder, config = open_run(run)
    stored_dtype = dtype_named(dtype)
    checkpoints = Checkpoints(folder / "checkpoints")
    if step is not None and step not in checkpoints.steps():
        existing = ", ".join(map(str, checkpoints.steps())) or "none"
        raise UserError(f"{folder}: has no checkpoint of step {step}; it has {existing}")
    checkpoint, damaged = (checkpoints.open(step), []) if step is not None else checkpoints.latest()
    if checkpoint is None:
        raise UserError(f"{damaged[0] if damaged else folder}: has no sound checkpoint; run `relora pretrain` first")
    for description in damaged:
        _log.warning("warning: %s; step %d is used", description, checkpoint.step)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    model = open_configured_model(config, eos_token_id=tokenizer.eos_token_id, trust_remote_code=trust_remote_code)
    rows = vocabulary_size(tokenizer)
    if config.model.resize_vocabulary == "auto" and rows > model.get_input_embeddings().num_embeddings:
        grow_vocabulary(model, rows)
    usage_of(model, config.data.sequence_length)  # decides, as in training, which layers have factors
    restore_weights(model, checkpoint, schedule_of(config), lowrank_of(config), seed=config.seed)
    merge(model)
    out = Path(out) if out is not None else folder / f"model-{checkpoint.step}"
    out.parent.mkdir(parents=True, exist_ok=True)
    return save_model(model, out, tokenizer, stored_dtype)


def export_gguf(
    source: str | Path,
    *,
    step: int | None = None,
    out: str | Path | None = None,
    dtype: str = "fp32",
    trust_remote_code: bool = False,
) -> Path:
    """Write a model as a new GGUF file.

    Args:
        source: a run folder, a model folder or a hub id. Of a run, RUN/model is taken, or a checkpoint if `step` is
            given or RUN/model does not exist; `export` writes the checkpoint to a temporary folder beside `out`.
        step: step of the run's checkpoint.
        out: by default RUN/model-DTYPE.gguf, RUN/model-STEP-DTYPE.gguf, NAME-DTYPE.gguf beside a model folder NAME, or
            NAME-DTYPE.gguf in the working directory for a hub id OWNER/NAME.
        dtype: one of `relora.export.gguf.GGUF_DTYPES`.
        trust_remote_code: see `export`.

    Returns:
        The file written.

    Raises:
        UserError: `export` or `write_gguf` refuse the source, `step` is given for something other than a run, or `out`
            exists. Nothing has been written.
        RunStopped: the disk is full or refuses the write.
    """
    path, from_run = Path(source), is_run(source)
    if step is not None and not from_run:
        raise UserError(f"--checkpoint {step}: {source} is not a run folder (no config.yaml in it)")
    folder = path / "model" if from_run else model_folder(source)
    out = Path(out) if out is not None else _default_gguf_file(path, from_run, step, dtype)
    check_gguf(out, dtype)
    if not from_run or (step is None and folder.is_dir()):
        return write_gguf(folder, out, load_tokenizer(str(folder)), dtype)
    temporary = out.with_name(f".{out.name}.model")
    try:
        exported = export(source, step=step, out=temporary, trust_remote_code=trust_remote_code)
        return write_gguf(exported, out, load_tokenizer(str(exported)), dtype)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_pretraining(run: Path) -> None:
    """Raise `UserError` for a fine-tuning run; the line says where its result is, or how it gets one."""
    if read_run_settings(run).task is None:
        return
    line = f"{run}: a fine-tuning run, of which no checkpoint is exported; "
    settings = run / "adapter" / "adapter_config.json"
    if settings.is_file() and read_json(settings).get("peft_type") != "LORA":
        raise UserError(f"{line}its prompts are used beside their base (`relora generate {run}`)")
    if (run / "adapter").is_dir():
        merging = f"`relora adapters merge {run / 'adapter'} --out MODEL` writes its model as a folder"
        raise UserError(f"{line}{merging}, and `relora export MODEL --format gguf` that one as a GGUF file")
    if (run / "model").is_dir():
        raise UserError(f"{line}its model is {run / 'model'}")
    raise UserError(f"{line}finish it with `relora finetune`")


def _default_gguf_file(path: Path, from_run: bool, step: int | None, dtype: str) -> Path:
    """Return the default output of `export_gguf`; `path` is its source as a path."""
    if from_run:
        name = "model" if step is None else f"model-{step}"
        return path / f"{name}-{dtype}.gguf"
    model = path.resolve() if path.is_dir() else Path(path.name)
    return model.with_name(f"{model.name}-{dtype}.gguf")
