"""Build a causal LM from a preset or open any Hugging Face one, check that data fits it, save it plainly.

Weights come from and go to safetensors alone: nothing is unpickled. Code that travels with a model is not run unless
the caller trusts it (`trust_remote_code`), and then its files are named.
A model drawn from scratch depends on its shape and its seed only, never on what was drawn before.
"""

import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder
from relora.files.untrusted import check_model_folder, no_address, remote_code
from relora.messages import first_line
from relora.model.presets import preset_settings
from relora.seeding import keyed_seed

Overrides = Mapping[str, int | bool]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of weights under the names that settings use."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_log = logging.getLogger(__name__)


def build_model(
    preset: str, overrides: Overrides | None = None, *, seed: int, eos_token_id: int | None = None
) -> PreTrainedModel:
    """A LLaMA of a published shape, in fp32 on the CPU, its weights drawn from `seed`.

    Args:
        preset: a name in `PRESETS`.
        overrides: shape keys of `transformers.LlamaConfig` that replace the preset's.
        eos_token_id: the id that ends a document in the training data; generation starts and stops at it.

    Raises:
        UserError: no such preset, or a shape that cannot be.
    """
    return _drawn(_overridden(LlamaConfig(**preset_settings(preset)), overrides or {}), seed, eos_token_id)


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
    """The causal LM in a folder or on the hub, on the CPU; `from_scratch`: its architecture, drawn anew in fp32.

    `overrides`, `seed` and `eos_token_id` serve `from_scratch` (see `build_model`), `dtype` trained weights.
    Within `torch.device("meta")` no weights are read: only the shapes are there. `trust_remote_code` runs the code
    that comes with the model, with a warning in the log that names its files.

    Raises:
        UserError: nothing there, not a causal LM, no safetensors, weights that do not fill the model, or a folder
            that asks for what `relora.files.untrusted` refuses.
    """
    folder = model_folder(path, trust_remote_code=trust_remote_code)
    check_model_folder(folder, trust_remote_code=trust_remote_code)
    with quiet_transformers():
        config = _read_config(folder, path, trust_remote_code)
        if from_scratch or torch.get_default_device().type == "meta":
            return _drawn(_overridden(config, overrides or {}), seed, eos_token_id, trust_remote_code)
        _check_weight_files(folder, path)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # named below, which transformers does not do in one line
                output_loading_info=True,
            )
        except Exception as error:  # whatever the library raises about a folder of somebody else's making
            raise UserError(f"{path}: cannot be opened as a causal LM: {_first_line(error)}") from None
    _check_report(report, path)
    return model


def model_folder(path: str | Path, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model given as a folder or a hub id (downloaded once: safetensors, text, trusted code)."""
    try:
        folder = Path(no_address(str(path))).expanduser()
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{path}: not a model folder (it has no config.json)")
        return folder
    if folder.exists():
        raise UserError(f"{path}: is a file; give the folder that holds config.json and the weights")
    try:
        files = ["*.json", "*.txt", "*.model", "model*.safetensors", *["*.py"] * trust_remote_code]
        return Path(snapshot_download(str(path), allow_patterns=files))
    except HFValidationError:
        raise UserError(f"{path}: no such folder (and no hub id is written like that)") from None
    except (HfHubHTTPError, OSError):
        raise UserError(f"{path}: no such folder, and the hub gave no model of that name") from None


def check_fit(model: PreTrainedModel, tokenizer_vocab_size: int, sequence_length: int) -> None:
    """`UserError` unless there is a row for every token id and a position for every token of a sequence."""
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer_vocab_size > rows:
        raise UserError(
            f"model.vocab_size: the model has {rows:,} ids, the data's tokenizer {tokenizer_vocab_size:,}; "
            f"set `model.vocab_size: {tokenizer_vocab_size}`, or prepare the data with the model's tokenizer"
        )
    positions = max_positions(model)
    if positions is not None and sequence_length > positions:
        raise UserError(
            f"data.sequence_length ({sequence_length:,}) is more than the model's {positions:,} positions; "
            "shorten it or, for a model from scratch, raise `model.max_position_embeddings`"
        )


def dtype_named(name: str) -> torch.dtype:
    """`fp32`, `bf16` or `fp16` -> the dtype; `UserError` for anything else."""
    if name not in DTYPES:
        raise UserError(f"dtype: `{name}` is none of {', '.join(DTYPES)}")
    return DTYPES[name]


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model was made for, in tokens; None if its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a plain Hugging Face model folder: configurations, safetensors, tokenizer.

    The folder is whole or absent, and replaces a model folder that was there (see `files.atomic`). Weights are stored
    as `dtype` (by default the widest in the model); the model is left as it is.

    Raises:
        UserError: low-rank factors are still in the model, or `folder` holds something other than a model.
        RunStopped: the disk is full or refuses the write.
    """
    folder = Path(folder)
    weights = model.state_dict()
    for key in weights:
        if "lora_" in key:
            raise UserError(f"{folder}: the model still holds low-rank factors (`{key}`); merge and strip them first")
        if "adaption_" in key:
            raise UserError(f"{folder}: the model still holds prompts of LLaMA-Adapter (`{key}`); remove them first")
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: exists and is not a model folder; it was left as it is")
    dtype = dtype or functools.reduce(torch.promote_types, {p.dtype for p in model.parameters()})
    try:
        with atomic_folder(folder, replace=True) as partial:
            with quiet_transformers():
                model.save_pretrained(partial, state_dict=_cast(weights, dtype))
                tokenizer.save_pretrained(partial)
            _state_dtype(partial / "config.json", dtype)
    except Exception as error:  # whatever a full disk is called: tokenizers gives it no class of its own
        raise RunStopped(f"{folder}: the model could not be written: {_first_line(error)}") from error
    return folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence what transformers says when it loads and generates; what matters of it is checked here."""
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
    """The configuration in a checked folder; one that needs the folder's code is refused unless that is trusted."""
    code = ", ".join(remote_code(folder))
    if code and trust_remote_code:
        _log.warning("warning: %s: runs code that came with the model: %s", path, code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the library raises about a file of somebody else's making
        if code and not trust_remote_code:
            raise UserError(
                f"{path}: needs code that comes with it ({code}), which is not run; read it, and if you trust it give "
                "`model.trust_remote_code: true` or --trust-remote-code"
            ) from None
        raise UserError(f"{path}: not a model that transformers knows: {_first_line(error)}") from None
    if not trust_remote_code and hasattr(config, "auto_map"):
        del config.auto_map  # this model is transformers' own; what is saved of it must not name that code either
    return config


def _drawn(
    config: PreTrainedConfig, seed: int, eos_token_id: int | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A new model of that configuration: fp32, on the CPU, the global random stream left where it was."""
    if eos_token_id is not None:
        config.bos_token_id = config.eos_token_id = eos_token_id
        config.pad_token_id = None
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            if torch.get_default_device().type != "meta":
                with torch.device("meta"):
                    _check_memory(AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings))
            torch.default_generator.manual_seed(keyed_seed(seed, "weights"))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings)
    except UserError:
        raise
    except Exception as error:  # whatever the library raises about a shape
        raise UserError(f"model: no causal LM can be built of this shape: {_first_line(error)}") from None
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model


def _check_memory(shapes: PreTrainedModel) -> None:
    """`UserError` for a model whose weights alone are more than the machine's main memory: asked for, it would die."""
    needed = 4 * sum(parameter.numel() for parameter in shapes.parameters())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(f"model: its weights take {needed / 1e9:,.0f} GB in fp32, main memory is {there / 1e9:,.0f} GB")


def _overridden(config: PreTrainedConfig, overrides: Overrides) -> PreTrainedConfig:
    """The configuration with other shape keys; what followed from the old ones follows from the new ones."""
    if not overrides:
        return config
    common = {own: name for name, own in config.attribute_map.items()}  # GPT-2 calls hidden_size n_embd
    old = {common.get(key, key): value for key, value in config.to_dict().items()}
    for key in overrides:
        if key not in old:
            raise UserError(f"model.{key}: a {config.model_type} model has no such key")
    new = {**old, **overrides}
    if new.get("num_hidden_layers") != old.get("num_hidden_layers"):
        new.pop("layer_types", None)  # one entry per layer
    if "num_attention_heads" in old:
        _settle_heads(old, new, overrides)
    try:
        return type(config)(**new)
    except Exception as error:  # whatever the library raises about a shape
        raise UserError(f"model: this shape cannot be: {_first_line(error)}") from None


def _settle_heads(old: dict[str, Any], new: dict[str, Any], overrides: Overrides) -> None:
    """Carry the number of key-value heads and the size of a head over to a new shape, and refuse one that cannot be."""
    hidden, heads = new["hidden_size"], new["num_attention_heads"]
    if old.get("num_key_value_heads") == old["num_attention_heads"] and "num_key_value_heads" not in overrides:
        new["num_key_value_heads"] = heads
    groups = new.get("num_key_value_heads") or heads
    if heads % groups:
        raise UserError(
            f"model.num_attention_heads ({heads}) is not a multiple of model.num_key_value_heads ({groups})"
        )
    if old.get("head_dim") not in (None, old["hidden_size"] // old["num_attention_heads"]):
        return  # a size of its own, whatever the hidden size
    if hidden % heads:
        raise UserError(f"model.hidden_size ({hidden}) is not a multiple of model.num_attention_heads ({heads})")
    if "rope_parameters" in old and hidden // heads % 2:
        raise UserError(
            f"model.hidden_size ({hidden}) over model.num_attention_heads ({heads}) must be even: "
            "rotary position embeddings turn pairs of numbers"
        )
    if "head_dim" in old:
        new["head_dim"] = hidden // heads


def _check_weight_files(folder: Path, path: str | Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if any(file.suffix in _PICKLED for file in folder.iterdir()):
        raise UserError(
            f"{path}: its weights are pickled and could run code when opened; if you trust them, convert them "
            f"with `AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained('NEW_FOLDER')`"
        )
    raise UserError(f"{path}: has no weights (no .safetensors file)")


def _check_report(report: Mapping[str, Any], path: str | Path) -> None:
    """`UserError` where the weights do not fill the model: transformers draws what is missing and goes on."""
    for key in sorted(report["missing_keys"]):
        raise UserError(f"{path}: its weights lack `{key}`; they are incomplete or of another architecture")
    for key, stored, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"{path}: `{key}` is {list(stored)} where config.json wants {list(wanted)}")
    for key in sorted(report["unexpected_keys"]):
        if "lora_" in key:
            raise UserError(f"{path}: holds low-rank factors (`{key}`); merge them and save it again")


def _cast(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point weights as `dtype`; tied weights stay one tensor, which is how a tie is recognised."""
    stored: dict[tuple[int, torch.Size], torch.Tensor] = {}
    cast = {}
    for name, weight in weights.items():
        place = (weight.data_ptr(), weight.shape)
        if place not in stored:
            stored[place] = weight.to(dtype) if weight.is_floating_point() else weight
        cast[name] = stored[place]
    return cast


def _state_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Name the dtype of the stored weights; transformers names that of the model in memory."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    """One line of a library's message: its second where the first only says who complains."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return first_line(lines[1] if isinstance(error, StrictDataclassError) and len(lines) > 1 else lines[0])
