"""The adapter format of PEFT, read and written: a folder with the trained update of a base model, a few MB large.

    adapter_config.json        peft_type LORA, r, lora_alpha, rank_pattern, alpha_pattern, use_rslora, use_dora, ...
    adapter_model.safetensors  base_model.model.PATH.lora_A.weight [r, in], .lora_B.weight [out, r]
                               base_model.model.PATH.lora_magnitude_vector [out]    with DoRA
                               base_model.model.PATH.PARAMETER                      tensors trained in full

    W' = W + s B A             s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
    W' = m (W + s B A) / |W + s B A|        with DoRA, row by row

PEFT 0.17 to 0.21 reads what is written here, and the other way round. A layer is identified by its path in the model,
so an adapter fits models of its base's structure only. A configuration key that changes what the adapter computes and
is not supported here is refused by its name; all other unknown keys are ignored.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relora.adapters.adapter import Adapter, Factors
from relora.adapters.notes import config_notes
from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder, write_json
from relora.files.untrusted import MB, check_folder, check_header, read_json
from relora.lowrank.patterns import by_pattern, compile_end_pattern
from relora.messages import first_line, first_mistake, short_name, short_repr

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Beginning of every key in the tensor file, before the path in the model."""
MOST_REPEATS = 3
"""Most `*`, `+` and `{` in a pattern; the time to match grows with the length of a name to this power."""
LONGEST_PATTERN = 200
"""Most characters in a pattern."""

T = TypeVar("T", bound=float)

_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
_BASE_COPY = re.compile(r"(.+)\.base_layer\.(\w+)")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_UNKNOWN_TENSOR = (
    "is no part of the adapter of a linear layer or an embedding, and is not known here; merge it in PEFT "
    "(`merge_and_unload`), and use the merged model"
)
_UNSUPPORTED = (
    *("lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "target_parameters"),
    *("megatron_config", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Keys of PEFT's LoraConfig that, if they are set, let the factors mean another function than in the module above."""
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations (`init_lora_weights`) that leave the base weights as they are; all others change them."""


class _Config(BaseModel):
    """The keys of adapter_config.json that determine which function the tensors describe; defaults are PEFT's."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    r: Annotated[int, Field(gt=0)] = 8
    lora_alpha: float = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | list[str] | None = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    bias: Literal["none", "all", "lora_only"] = "none"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    def scaling(self, path: str, r: int) -> float:
        """Return the scaling s of the layer at `path`, whose rank is r."""
        alpha = by_pattern(self.alpha_pattern or {}, path, self.lora_alpha, "alpha_pattern")
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def read_adapter(folder: str | Path) -> Adapter:
    """Read the adapter in a folder and check it: configuration, names of tensors, shapes, finite numbers.

    Whether it fits a model is checked by `compatibility`.

    Raises:
        UserError: the folder holds no adapter, or one that is of another kind, damaged, pickled, or that uses what is
            not supported here.
    """
    folder = Path(folder)
    settings = read_config(folder)
    config = _checked_config(settings, folder / CONFIG)
    where = folder / TENSORS
    with _open_tensors(where) as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a file is no mapping
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    base_copies: dict[str, Tensor] = {}
    rows: dict[str, Mapping[int, Tensor]] = {}
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        factor = _FACTOR.fullmatch(name)
        if name == key or (factor is None and "lora_" in name):
            raise UserError(f"{where}: `{short_name(key, 160)}` {_UNKNOWN_TENSOR}")
        if tensor.dtype not in _FLOATS or not torch.isfinite(tensor).all():
            raise UserError(f"{where}: `{short_name(key, 160)}` holds what is not a finite number; it is of no use")
        if factor is not None:
            layers.setdefault(factor[1], {})[factor[2]] = tensor
        elif found := _ROWS.fullmatch(name):
            rows[f"{found[1]}.weight"] = _rows(found[1], tensor, config, folder)
        elif (copied := _BASE_COPY.fullmatch(name)) and copied[2] != "bias":
            base_copies[f"{copied[1]}.{copied[2]}"] = tensor
        else:
            others[f"{copied[1]}.{copied[2]}" if copied else name] = tensor
    if not layers:
        raise UserError(f"{where}: holds no low-rank factors")
    for key in (*others, *base_copies):
        path, _, name = key.rpartition(".")
        if (path in layers) != (key in base_copies) and name != "bias":
            raise UserError(f"{where}: holds factors and another weight for {short_name(path, 160)}")
    exact = isinstance(config.target_modules, list) and not (config.exclude_modules or config.layers_to_transform)
    return Adapter(
        layers={path: _layer_factors(path, tensors, config, folder) for path, tensors in layers.items()},
        others=others,
        base_copies=base_copies,
        rows=rows,
        base=config.base_model_name_or_path,
        revision=config.revision,
        targets=tuple(sorted(config.target_modules or ())) if exact else (),
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        fan_in_fan_out=bool(config.fan_in_fan_out),
        tied=bool(config.ensure_weight_tying),
        task_type=config.task_type,
        notes=config_notes(settings, _Config.model_fields, layers, list(others), list(rows)),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter_config.json in a folder, whatever kind of adapter it describes.

    Raises:
        UserError: no such folder, no adapter_config.json in it, or not a JSON object.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds {CONFIG}")
    check_folder(folder)
    if not (folder / CONFIG).is_file():
        below = ", ".join(sorted(short_name(file.parent.name) for file in folder.glob(f"*/{CONFIG}")))
        which = f"; below it: {below}; give one of these" if below else ""  # as PEFT saves several adapters
        raise UserError(f"{folder}: not an adapter (it has no {CONFIG}){which}")
    tree = read_json(folder / CONFIG, MB)
    if not isinstance(tree, dict):
        raise UserError(f"{folder / CONFIG}: not a JSON object")
    return tree


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of every tensor of an adapter of any kind, by its key, from the header of the tensor file."""
    with _open_tensors(folder / TENSORS) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def write_adapter(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write an adapter as a folder that PEFT loads; the folder is whole or absent (see `files.atomic`).

    Returns:
        The folder.

    Raises:
        UserError: `folder` exists; with `overwrite`, only if it holds something other than an adapter.
        RunStopped: the disk is full or refuses the write. A folder that existed has not changed.
    """
    folder = Path(folder)
    if folder.exists() and not (overwrite and (folder / CONFIG).is_file()):
        raise UserError(f"{folder}: is there already and was left as it is; give another folder")
    tensors: dict[str, Tensor] = {}
    for path, factors in adapter.layers.items():
        names = ("lora_embedding_A", "lora_embedding_B") if factors.of_embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{PREFIX}{path}.{names[0]}": factors.lora_A, f"{PREFIX}{path}.{names[1]}": factors.lora_B}
        if factors.magnitude is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = factors.magnitude
    for key, tensor in (*adapter.others.items(), *adapter.base_copies.items()):
        path, _, name = key.rpartition(".")
        tensors[f"{PREFIX}{path}.base_layer.{name}" if path in adapter.layers else f"{PREFIX}{key}"] = tensor
    for key, rows in adapter.rows.items():
        delta = f"{PREFIX}{key.rpartition('.')[0]}.token_adapter.trainable_tokens_delta"
        tensors[delta] = torch.stack(list(rows.values()))
    # tied weights are one tensor under two names, which the file format does not allow, so every tensor is copied
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    try:
        with atomic_folder(folder, replace=overwrite, parents=True) as partial:
            save_file(stored, partial / TENSORS, metadata={"format": "pt"})
            write_json(partial / CONFIG, _peft_config(adapter), indent=2, sort_keys=True)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
        raise RunStopped(f"{folder}: the adapter could not be written: {first_line(str(error))}") from None
    return folder


def common_and_patterns(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """Split values by layer into a common one and patterns for the layers that differ, as PEFT's format stores them.

    Returns:
        The most frequent value, and the values of all other layers by patterns for the ends of their paths. Each
        pattern is the shortest of: last part of the path, whole path, whole path anchored at the start, that matches
        no layer of another value.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    patterns: dict[str, T] = {}
    for path, value in values.items():
        if value != common and by_pattern(patterns, path, common, "") != value:
            keys = (path.rpartition(".")[2], path, f"^{re.escape(path)}")
            different = [other for other in values if values[other] != value]
            patterns[next(key for key in keys if not any(_matches(key, other) for other in different))] = value
    return common, patterns


def _matches(key: str, path: str) -> bool:
    """Tell whether the pattern `key` matches the end of a path."""
    return bool(compile_end_pattern(key, "").match(path))


def _checked_config(tree: dict[str, Any], file: Path) -> _Config:
    """Check the configuration `tree` of a LoRA adapter, read from `file`.

    Raises:
        UserError: another kind of adapter, an unsupported key, or a value of a wrong type.
    """
    kind = tree.get("peft_type")
    if kind != "LORA":
        line = f"{file}: peft_type {short_repr(kind)} is not LORA: only LoRA, rsLoRA and DoRA are known here"
        if kind == "ADAPTION_PROMPT":
            raise UserError(
                f"{line}; prompts of LLaMA-Adapter are used beside their base (`relora generate --adapter`)"
            )
        raise UserError(f"{line}; merge it in PEFT (`merge_and_unload`), if it can be, and use the merged model")
    for key in _UNSUPPORTED:
        if tree.get(key):
            raise UserError(
                f"{file}: `{key}` is {short_repr(tree[key])}, which is not supported here; merge the adapter in PEFT "
                "(`merge_and_unload`), and use the merged model"
            )
    init = tree.get("init_lora_weights")
    if init not in _BASE_UNCHANGED:
        raise UserError(
            f"{file}: `init_lora_weights` is {short_repr(init)}: its base is not the original; save it in PEFT with "
            "`path_initial_model_for_weight_conversion`"
        )
    try:
        config = _Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: {first_mistake(error)}") from None
    for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns or ():
            _check_pattern(key, f"{file}: {name}")
    return config


def _check_pattern(key: str, where: str) -> None:
    """Check that a pattern of the setting `where` is a regular expression that is matched in a short time.

    Raises:
        UserError: it is not a regular expression, is too long, or has too many or nested repeats.
    """
    repeats = len(re.findall(r"[*+{]", key))
    if len(key) > LONGEST_PATTERN or repeats > MOST_REPEATS or re.search(r"\)[*+{]|\{[^}]*\d{3}", key):
        raise UserError(f"{where}: {short_repr(key)} has more repeats (`*`, `+`) than the name of a layer needs")
    compile_end_pattern(key, where)


def _layer_factors(path: str, tensors: Mapping[str, Tensor], config: _Config, folder: Path) -> Factors:
    """Build one layer's update from its tensors.

    Args:
        tensors: by `lora_A`, `lora_B`, `lora_magnitude_vector`.
        folder: the adapter's folder, for messages.

    Raises:
        UserError: a tensor is missing or superfluous, or shapes do not fit each other or the configuration's rank.
    """
    where = f"{folder}: {short_name(path, 160)}"
    of_embedding = "lora_embedding_A" in tensors
    name_A, name_B = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A", "lora_B")
    wanted = {name_A, name_B} | ({"lora_magnitude_vector"} if config.use_dora else set())
    if tensors.keys() != wanted:
        differing = ", ".join(sorted(tensors.keys() ^ wanted))
        raise UserError(f"{where}: {differing} {'is' if ',' not in differing else 'are'} missing, or too much")
    lora_A, lora_B = tensors[name_A], tensors[name_B]
    magnitude = tensors.get("lora_magnitude_vector")
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1] or not lora_A.shape[0]:
        sides = f"lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}"
        raise UserError(f"{where}: {sides} are no [r, in] and [out, r]")
    if magnitude is not None and magnitude.shape != lora_B.shape[:1]:
        raise UserError(f"{where}: lora_magnitude_vector is {list(magnitude.shape)} for {lora_B.shape[0]} outputs")
    r = by_pattern(config.rank_pattern or {}, path, config.r, "rank_pattern")
    if r != lora_A.shape[0]:
        raise UserError(f"{where}: has rank {lora_A.shape[0]}, {CONFIG} says {r}")
    return Factors(lora_A, lora_B, config.scaling(path, r), magnitude, of_embedding)


def _rows(path: str, values: Tensor, config: _Config, folder: Path) -> Mapping[int, Tensor]:
    """Return the trained rows [width] of the embedding at `path` by their ids.

    Raises:
        UserError: the configuration does not name as many ids for it as there are rows.
    """
    named = config.trainable_token_indices
    if isinstance(named, dict):
        named = next((ids for name, ids in named.items() if f".{path}".endswith(f".{name}")), None)
    if named is None or values.dim() != 2 or len(set(named)) != len(values):
        count = "no" if named is None else len(named)
        raise UserError(
            f"{folder}: `trainable_token_indices` names {count} ids for {short_name(path, 160)}, whose trained rows "
            f"are {list(values.shape)}"
        )
    return dict(zip(named, values, strict=True))


@contextmanager
def _open_tensors(file: Path) -> Iterator[Any]:
    """Open the safetensors file of an adapter for the block.

    Raises:
        UserError: there is no such file, only a pickled one, or the file is damaged.
    """
    if not file.is_file():
        pickled = next((other for other in file.parent.glob("adapter_model.*")), None)
        if pickled is None:
            raise UserError(f"{file.parent}: has no {file.name}")
        raise UserError(
            f"{pickled}: not safetensors; a pickled adapter could run code when opened: if you trust it, load it in "
            "PEFT and save it again"
        )
    check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"{file}: damaged, or not a safetensors file ({first_line(str(error))})") from None


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """Return the content of adapter_config.json; keys that are left out have PEFT's defaults."""
    r, rank_pattern = common_and_patterns({path: factors.r for path, factors in adapter.layers.items()})
    alpha, alpha_pattern = common_and_patterns(adapter.alphas())
    # of a low-rank layer, only the bias can be among the tensors that were trained in full
    owners = {path for key in adapter.others if (path := key.rpartition(".")[0]) not in adapter.layers}
    biases = any(key.rpartition(".")[0] in adapter.layers for key in adapter.others)
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "target_modules": list(adapter.targets or sorted(adapter.layers)),
        "modules_to_save": sorted(owners) or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "ensure_weight_tying": adapter.tied,
        "init_lora_weights": True,
        "inference_mode": True,
        "trainable_token_indices": {key.rpartition(".")[0]: list(rows) for key, rows in adapter.rows.items()} or None,
    }
