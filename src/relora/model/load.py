"""Building a causal LM from a preset, and opening any causal LM of Hugging Face.

Weights are read from safetensors only: nothing is unpickled. Code that comes with a model is not run
unless the caller trusts it (`trust_remote_code`), and then a warning names its files. The weights of a new model depend
on its configuration and the seed only, not on random numbers that were drawn before.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from relora.errors import UserError
from relora.files.hub import CODE_FILES, MODEL_FILES, hub_folder
from relora.files.untrusted import (
    INDEX_BYTES,
    check_model_folder,
    inside,
    no_address,
    read_json,
    remote_code,
)
from relora.lowrank.blocks import block_lists
from relora.messages import short_name
from relora.model.presets import preset_settings
from relora.model.shape import POSITIONS, Overrides, informative_line, with_overrides
from relora.model.unread import unread_note
from relora.seeding import keyed_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of weights, by their names in settings."""

_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
"""Endings of files with pickled weights."""
_OTHERS = {".gguf": "GGUF", ".h5": "TensorFlow's", ".msgpack": "Flax's", ".onnx": "ONNX", ".npz": "MLX or NumPy"}
"""Endings of files with weights for other programs, and what these files are called."""

_OTHER_TASKS = re.compile("Classification|QuestionAnswering|MultipleChoice|Reward|Regression")
"""Parts of the names of classes whose head has another task than to predict the next token."""

_log = logging.getLogger(__name__)


def build_model(
    preset: str, overrides: Overrides | None = None, *, seed: int, eos_token_id: int | None = None
) -> PreTrainedModel:
    """Build a LLaMA of a published shape in fp32 on the CPU; its weights are drawn from `seed`.

    Args:
        preset: a name in `PRESETS`.
        overrides: keys of `transformers.LlamaConfig` that replace the preset's.
        eos_token_id: id of the token that ends a document in the training data; generation starts and stops at it.

    Raises:
        UserError: there is no such preset, no model of this shape can be built, or it is too large for main memory.
    """
    return _new_model(with_overrides(LlamaConfig(**preset_settings(preset)), overrides or {}), seed, eos_token_id)


def open_model(
    path: str | Path,
    *,
    from_scratch: bool = False,
    overrides: Overrides | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Open the causal LM in a folder or on the hub, on the CPU.

    Its attention is torch's `scaled_dot_product_attention` or, in a class that transformers gives none, the class's own
    (see `relora.model.attention.attention_note`). Within `torch.device("meta")` no weights are read, and the model has
    shapes only.

    Args:
        path: folder or hub id.
        from_scratch: take only the configuration, and draw new weights in fp32.
        overrides: with `from_scratch`, keys that replace those of the configuration.
        seed: with `from_scratch`, the seed of the weights.
        eos_token_id: with `from_scratch`, as in `build_model`.
        dtype: without `from_scratch`, the dtype of the weights in memory.
        trust_remote_code: run code that comes with the model; a warning in the log names its files.

    Raises:
        UserError: there is no such model, it is not a causal LM or has the head of a classifier, its weights are not
            safetensors or do not fill the model, or the folder holds what `relora.files.untrusted` refuses.
    """
    folder = model_folder(path, trust_remote_code=trust_remote_code)
    check_model_folder(folder, trust_remote_code=trust_remote_code)
    with quiet_transformers():
        config = _read_config(folder, path, trust_remote_code)
        if from_scratch or torch.get_default_device().type == "meta":
            shaped = with_overrides(config, overrides or {})
            model = _new_model(shaped, seed, eos_token_id, trust_remote_code)
            _check_depth(model, overrides or {})
            return model
        _check_weight_files(folder, path)
        if not hasattr(config, "auto_map") and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(f"{path}: cannot be opened as a causal LM: transformers has none for {config.model_type}")
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # `_check_report` raises for them, in one line
                output_loading_info=True,
            )
        except Exception as error:  # any error: the folder may hold anything
            raise UserError(f"{path}: cannot be opened as a causal LM: {informative_line(error)}") from None
    _check_report(report, path, _class_that_saved(config, model))
    if note := unread_note(model, report["unexpected_keys"], folder):
        _log.warning("warning: %s: %s", path, note)
    return model


def model_folder(path: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Return the local folder of a model that is given as a folder or a hub id.

    A model on the hub is downloaded once: its safetensors, text files and, with `trust_remote_code`, code.

    Raises:
        UserError: no such folder or hub id, the folder has no config.json, or `path` is an address on the web.
    """
    try:
        folder = Path(no_address(str(path))).expanduser()
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    if folder.is_dir():
        if not (folder / "config.json").exists():
            remedy = f"; give {path}/model" if (folder / "model" / "config.json").exists() else ""
            raise UserError(f"{path}: not a model folder (it has no config.json){remedy}")
        return folder
    if folder.exists():
        raise UserError(f"{path}: is a file; give the folder that holds config.json and the weights")
    return hub_folder(str(path), "model", (*MODEL_FILES, *CODE_FILES) if trust_remote_code else MODEL_FILES)


def check_fit(
    model: PreTrainedModel, tokenizer_vocab_size: int, sequence_length: int, *, remedy: str | None = None
) -> None:
    """Check that the model has an embedding row for every token id and a position for every token of a sequence.

    Args:
        remedy: what to do if there are too few rows; by default, what helps a new model.

    Raises:
        UserError: it has fewer; the message names both numbers and the key to change.
    """
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer_vocab_size > rows:
        remedy = remedy or (
            f"set `model.vocab_size: {tokenizer_vocab_size}`, or prepare the data with the model's tokenizer"
        )
        raise UserError(f"model: has {rows:,} ids, the tokenizer {tokenizer_vocab_size:,}; {remedy}")
    key, positions = _positions(model.config)
    if positions is not None and sequence_length > positions:
        raise UserError(
            f"data.sequence_length ({sequence_length:,}) is more than the model's {positions:,} positions; "
            f"shorten it or, for a model from scratch, raise {_positions_remedy(model.config, key)}"
        )


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype that a name in `DTYPES` stands for; `UserError` for another name."""
    if name not in DTYPES:
        raise UserError(f"dtype: `{name}` is none of {', '.join(DTYPES)}")
    return DTYPES[name]


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence for which the model was built, in tokens; None if its configuration has no limit."""
    return _positions(model.config)[1]


def _positions(config: PreTrainedConfig) -> tuple[str, int | None]:
    """Return the key of the number of positions, as it stands in config.json, and the number; None if it has no limit.

    A limit that is not positive is none (XLNet's is -1). In a model with an image tower the text part has it.
    """
    for part in (config, config.get_text_config(decoder=True)):
        for key in POSITIONS:
            found = getattr(part, key, None)
            if isinstance(found, int) and found > 0:
                return part.attribute_map.get(key, key), found
    return "", None


def _positions_remedy(config: PreTrainedConfig, own: str) -> str:
    """Name what to raise in a model from scratch: the key of a run's configuration, and that of config.json.

    Args:
        own: key in config.json.
    """
    if not hasattr(config, own) and own not in config.attribute_map.values():
        return f"`{own}` of the text part in its config.json"
    named = "" if own == POSITIONS[0] else f" (`{own}` in its config.json)"
    return f"`model.{POSITIONS[0]}`{named}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the log messages and progress bars of transformers within the context.

    Callers check themselves what transformers would warn of, such as missing weights.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _read_config(folder: Path, path: str | Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Read the configuration in a folder that `check_model_folder` has passed.

    Args:
        path: the model's name for messages.

    Raises:
        UserError: transformers does not know the architecture, or it needs code in the folder that is not trusted.
    """
    code = ", ".join(remote_code(folder))
    if code and trust_remote_code:
        _log.warning("warning: %s: runs code that came with the model: %s", path, code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any error: the file may hold anything
        if code and not trust_remote_code:
            raise UserError(
                f"{path}: needs code that comes with it ({code}), which is not run; read it, and if you trust it give "
                "`model.trust_remote_code: true` or --trust-remote-code"
            ) from None
        raise UserError(f"{path}: not a model that transformers knows: {informative_line(error)}") from None
    if not trust_remote_code and hasattr(config, "auto_map"):
        del config.auto_map  # transformers' own class is used, so a saved copy must not refer to the untrusted code
    # each part gets the implementation that transformers prefers for it: SDPA, or its own if it has no SDPA
    config._attn_implementation = None
    config.return_dict = True  # this package reads outputs by name
    return config


def _new_model(
    config: PreTrainedConfig, seed: int, eos_token_id: int | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a model with new weights in fp32 on the CPU; the state of the global random generator does not change.

    Raises:
        UserError: no causal LM can be built from the configuration, or its weights do not fit into main memory.
    """
    if eos_token_id is not None:
        config.bos_token_id = config.eos_token_id = eos_token_id
        config.pad_token_id = None
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            if torch.get_default_device().type != "meta":
                with torch.device("meta"):
                    _check_memory(AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings))
            torch.default_generator.manual_seed(keyed_seed(seed, "weights"))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings)
    except UserError:
        raise
    except Exception as error:  # the library has no class of its own for impossible shapes
        raise UserError(f"model: no causal LM can be built of this shape: {informative_line(error)}") from None
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model


def _check_depth(model: PreTrainedModel, overrides: Overrides) -> None:
    """Raise `UserError` if the number of layers was given and the architecture did not take it."""
    wanted, found = overrides.get("num_hidden_layers"), [len(model.get_submodule(path)) for path in block_lists(model)]
    if wanted is not None and found and wanted not in found:
        raise UserError(
            f"model.num_hidden_layers: a {model.config.model_type} model does not take the number of its layers from "
            "it; change the key that it has in its config.json"
        )


def _check_memory(shapes: PreTrainedModel) -> None:
    """Raise `UserError` if the weights take more than main memory in fp32; the system would kill the process.

    Args:
        shapes: the model on the meta device.
    """
    needed = 4 * sum(parameter.numel() for parameter in shapes.parameters())
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        sizes = f"{needed / 1e9:,.0f} GB in fp32, main memory is {available / 1e9:,.0f} GB"
        raise UserError(f"model: its weights take {sizes}")


def _check_weight_files(folder: Path, path: str | Path) -> None:
    """Raise `UserError` if a model folder has no safetensors, or lacks one that its index names.

    Args:
        path: the model's name for messages.
    """
    if any(folder.glob("*.safetensors")):
        index = folder / "model.safetensors.index.json"
        if index.is_file() and not (folder / "model.safetensors").is_file():
            for name in sorted(set(read_json(index, INDEX_BYTES)["weight_map"].values())):
                if not inside(folder, name).is_file():
                    raise UserError(f"{path}: has no {name}, which {index.name} names; download or copy it again")
        return
    endings = {file.suffix for file in folder.iterdir()}
    if endings & _PICKLED:
        raise UserError(
            f"{path}: its weights are pickled and could run code when opened; if you trust them, convert them "
            f"with `AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained('NEW_FOLDER')`"
        )
    for ending in sorted(endings & _OTHERS.keys()):
        raise UserError(f"{path}: has no weights in safetensors, only {_OTHERS[ending]} files, which are not read here")
    raise UserError(f"{path}: has no weights in safetensors")


def _class_that_saved(config: PreTrainedConfig, model: PreTrainedModel) -> str | None:
    """Return the class that a configuration names as the one that wrote the weights, if it is not the model's."""
    named = [name for name in config.architectures or [] if isinstance(name, str) and name != type(model).__name__]
    return short_name(named[0]) if named else None


def _check_report(report: Mapping[str, Any], path: str | Path, saved_by: str | None) -> None:
    """Raise `UserError` if the weights do not fill the model; transformers itself would draw the missing ones.

    Args:
        report: transformers' report on the loading.
        path: the model's name for messages.
        saved_by: another class than the model's, by which the weights were saved.
    """
    unexpected = sorted(report["unexpected_keys"])
    if unexpected and saved_by and _OTHER_TASKS.search(saved_by):
        raise UserError(
            f"{path}: is a {saved_by}, whose head (`{short_name(unexpected[0])}`) is not that of a language model; "
            "give the model that it was made of"
        )
    for key in sorted(report["missing_keys"]):
        what = f"they are those of a {saved_by}" if saved_by else "they are incomplete or of another architecture"
        raise UserError(f"{path}: its weights lack `{key}`; {what}")
    for key, stored, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"{path}: `{key}` is {list(stored)} where config.json wants {list(wanted)}")
    for key in unexpected:
        if "lora_" in key:
            raise UserError(f"{path}: holds low-rank factors (`{key}`); merge them and save it again")
