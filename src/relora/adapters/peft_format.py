"""Adapters: trained updates in a folder of their own, a few MB beside the base model; PEFT's format, both ways.

    adapter_config.json        peft_type LORA, r, lora_alpha, rank_pattern, alpha_pattern, use_rslora, use_dora, ...
    adapter_model.safetensors  base_model.model.PATH.lora_A.weight [r, in], .lora_B.weight [out, r]
                               base_model.model.PATH.lora_magnitude_vector [out]    with DoRA
                               base_model.model.PATH.PARAMETER                      of what was trained in full

    W' = W + s B A             s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
    W' = m (W + s B A) / |W + s B A|        with DoRA, row by row

PEFT 0.17 to 0.21 reads what is written here, and the other way round. A layer stands under its path in the model, so an
adapter fits its own base and no other. What changes the function and is not known here is refused by the name of its
key; what does not is passed over.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder, write_json
from relora.files.untrusted import MB, check_folder, check_header, read_json
from relora.lowrank.dora import row_norms
from relora.lowrank.patterns import by_pattern, compile_end_pattern
from relora.messages import first_line, first_mistake, short_name, short_repr

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MOST_REPEATS = 3
"""`*` and `+` in a pattern: time to match grows with the length of a name to this power."""
LONGEST_PATTERN = 200

T = TypeVar("T", bound=float)

_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_UNKNOWN = (
    *("lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "trainable_token_indices"),
    *("target_parameters", "megatron_config", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Keys of PEFT's LoraConfig that, where they are set, make another function of the factors."""
_ADDED_TO_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Starts (`init_lora_weights`) that leave the base as it is; all others train beside a changed one."""


@dataclass(frozen=True)
class Factors:
    """The update of one linear layer."""

    lora_A: Tensor
    """[r, in]"""
    lora_B: Tensor
    """[out, r]"""
    scaling: float
    magnitude: Tensor | None = None
    """[out]; DoRA (Liu et al. 2024, arXiv 2402.09353, section 4.1), None of plain LoRA."""

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there is to store."""
        return (self.lora_A, self.lora_B) if self.magnitude is None else (self.lora_A, self.lora_B, self.magnitude)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s·B A [out, in], in `dtype` or the factors' own, whichever is finer."""
        dtype = torch.promote_types(dtype, self.lora_A.dtype)
        return (self.scaling * self.lora_B.to(dtype)) @ self.lora_A.to(dtype)

    def added_to(self, weight: Tensor) -> Tensor:
        """W' [out, in] of W [out, in], in fp32 or better."""
        delta = self.delta(torch.promote_types(weight.dtype, torch.float32))
        sums = delta.add_(weight.to(delta.dtype))
        return sums if self.magnitude is None else sums.mul_(self.row_scale(sums)[:, None])

    def row_scale(self, sums: Tensor) -> Tensor:
        """m / |W + s B A| [out] of W + s B A [out, in]."""
        assert self.magnitude is not None
        return self.magnitude.to(sums.dtype) / row_norms(sums)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a folder holds."""

    layers: Mapping[str, Factors]
    """By path of the layer."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors trained in full, by their key in the model's state."""
    base: str | None = None
    """The base model as it was called when the adapter was made: a folder or a hub id."""
    targets: tuple[str, ...] = ()
    """Names that select the layers, and nothing else, in the base; empty: only their whole paths do."""
    rslora: bool = False
    dropout: float = 0.0
    fan_in_fan_out: bool = False
    """The base's layers are `Conv1D`; the factors do not depend on it, PEFT wants to be told."""
    tied: bool = False
    """`others` holds tied weights, once for each of their names."""
    task_type: str | None = None

    @property
    def dora(self) -> bool:
        """Each layer has a magnitude."""
        return any(factors.magnitude is not None for factors in self.layers.values())

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All there is to store."""
        for factors in self.layers.values():
            yield from factors.tensors
        yield from self.others.values()

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return sum(tensor.numel() for tensor in self.tensors)


class _Config(BaseModel):
    """The part of adapter_config.json that says which function the tensors are."""

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
    task_type: str | None = None
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None

    def scaling(self, path: str, r: int) -> float:
        """s of a layer of rank r."""
        alpha = by_pattern(self.alpha_pattern or {}, path, self.lora_alpha, "alpha_pattern")
        return alpha / (math.sqrt(r) if self.use_rslora else r)


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in a folder, checked for itself: keys, names, shapes, finite numbers.

    Raises:
        UserError: no adapter, one of another kind, damaged, pickled, or one that needs what is not known here.
    """
    folder = Path(folder)
    config = _parsed(read_config(folder), folder / CONFIG)
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    with _opened(folder / TENSORS) as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a file is no mapping
    for key, tensor in stored.items():
        name, where = key.removeprefix(PREFIX), f"{folder / TENSORS}: `{short_name(key, 160)}`"
        factor = _FACTOR.fullmatch(name)
        if name == key or (factor is None and "lora_" in name):
            raise UserError(f"{where} is no part of the adapter of a linear layer, and is not known here")
        if tensor.dtype not in _FLOATS or not torch.isfinite(tensor).all():
            raise UserError(f"{where} holds what is not a finite number; the adapter is of no use")
        if factor is None:
            others[re.sub(r"\.base_layer\.(\w+)$", r".\1", name)] = tensor
        else:
            layers.setdefault(factor[1], {})[factor[2]] = tensor
    if not layers:
        raise UserError(f"{folder / TENSORS}: holds no low-rank factors")
    for key in others:
        path, _, name = key.rpartition(".")
        if path in layers and name != "bias":
            raise UserError(f"{folder / TENSORS}: holds factors and another weight for {short_name(path, 160)}")
    exact = isinstance(config.target_modules, list) and not (config.exclude_modules or config.layers_to_transform)
    return Adapter(
        layers={path: _factors(path, tensors, config, folder) for path, tensors in layers.items()},
        others=others,
        base=config.base_model_name_or_path,
        targets=tuple(sorted(config.target_modules or ())) if exact else (),
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        fan_in_fan_out=bool(config.fan_in_fan_out),
        tied=bool(config.ensure_weight_tying),
        task_type=config.task_type,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder, of whatever kind of adapter."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds {CONFIG}")
    check_folder(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not an adapter (it has no {CONFIG})")
    tree = read_json(folder / CONFIG, MB)
    if not isinstance(tree, dict):
        raise UserError(f"{folder / CONFIG}: not a JSON object")
    return tree


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an adapter of any kind, from the header alone."""
    with _opened(folder / TENSORS) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def write_adapter(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a folder that PEFT loads; it is whole or absent (see `files.atomic`).

    Raises:
        UserError: `folder` is there; with `overwrite`, if it is anything but an adapter.
        RunStopped: the disk is full or refuses the write; what was there is untouched.
    """
    folder = Path(folder)
    if folder.exists() and not (overwrite and (folder / CONFIG).is_file()):
        raise UserError(f"{folder}: is there already and was left as it is; give another folder")
    tensors = {}
    for path, factors in adapter.layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = factors.lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = factors.lora_B
        if factors.magnitude is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = factors.magnitude
    for key, tensor in adapter.others.items():
        path, _, name = key.rpartition(".")
        tensors[f"{PREFIX}{path}.base_layer.{name}" if path in adapter.layers else f"{PREFIX}{key}"] = tensor
    # copies: tied weights are one tensor under two names, which the file format does not allow
    stored = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    try:
        with atomic_folder(folder, replace=overwrite, parents=True) as partial:
            save_file(stored, partial / TENSORS, metadata={"format": "pt"})
            write_json(partial / CONFIG, _peft_config(adapter), indent=2, sort_keys=True)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
        raise RunStopped(f"{folder}: the adapter could not be written: {first_line(str(error))}") from None
    return folder


def common_and_patterns(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most frequent value of all layers, and patterns for the others, as short as they can be."""
    common = Counter(values.values()).most_common(1)[0][0]
    patterns: dict[str, T] = {}
    for path, value in values.items():
        if value != common and by_pattern(patterns, path, common, "") != value:
            keys = (path.rpartition(".")[2], path, f"^{re.escape(path)}")
            fitting = (key for key in keys if all(_matched(key, other) <= (values[other] == value) for other in values))
            patterns[next(fitting)] = value
    return common, patterns


def _matched(key: str, path: str) -> bool:
    return bool(compile_end_pattern(key, "").match(path))


def _parsed(tree: dict[str, Any], file: Path) -> _Config:
    """The checked configuration of an adapter of our kind."""
    kind = tree.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{file}: peft_type {short_repr(kind)} is not LORA: only LoRA, rsLoRA and DoRA are known here")
    for key in _UNKNOWN:
        if tree.get(key):
            raise UserError(f"{file}: `{key}` is {short_repr(tree[key])}, which is not supported here")
    start = tree.get("init_lora_weights")
    if start not in _ADDED_TO_THE_BASE:
        raise UserError(
            f"{file}: `init_lora_weights` is {short_repr(start)}: its base is not the original; save it in PEFT with "
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
    """`UserError` for what is no regular expression, or one that could take for ever to match."""
    repeats = len(re.findall(r"[*+{]", key))
    if len(key) > LONGEST_PATTERN or repeats > MOST_REPEATS or re.search(r"\)[*+{]|\{[^}]*\d{3}", key):
        raise UserError(f"{where}: {short_repr(key)} has more repeats (`*`, `+`) than the name of a layer needs")
    compile_end_pattern(key, where)


def _factors(path: str, tensors: Mapping[str, Tensor], config: _Config, folder: Path) -> Factors:
    """One layer's tensors, if they belong together and to the configuration."""
    where = f"{folder}: {short_name(path, 160)}"
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.use_dora else set())
    if tensors.keys() != wanted:
        differing = ", ".join(sorted(tensors.keys() ^ wanted))
        raise UserError(f"{where}: {differing} {'is' if ',' not in differing else 'are'} missing, or too much")
    a, b, magnitude = (tensors.get(name) for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    assert a is not None and b is not None
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise UserError(f"{where}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are no [r, in] and [out, r]")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise UserError(f"{where}: lora_magnitude_vector is {list(magnitude.shape)} for {b.shape[0]} outputs")
    r = by_pattern(config.rank_pattern or {}, path, config.r, "rank_pattern")
    if r != a.shape[0]:
        raise UserError(f"{where}: has rank {a.shape[0]}, {CONFIG} says {r}")
    return Factors(a, b, config.scaling(path, r), magnitude)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; `UserError` where there is none, or none that can be read."""
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
    """adapter_config.json; what is left out has PEFT's defaults."""
    r, rank_pattern = common_and_patterns({path: factors.r for path, factors in adapter.layers.items()})
    alpha, alpha_pattern = common_and_patterns(alphas(adapter))
    # of a target only the bias can be among the others
    owners = {path for key in adapter.others if (path := key.rpartition(".")[0]) not in adapter.layers}
    biases = any(key.rpartition(".")[0] in adapter.layers for key in adapter.others)
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base,
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
    }


def alphas(adapter: Adapter) -> dict[str, float]:
    """lora_alpha of every layer: scaling times r (or its square root), freed of the quotient's rounding."""
    exact = {
        path: factors.scaling * (math.sqrt(factors.r) if adapter.rslora else factors.r)
        for path, factors in adapter.layers.items()
    }
    rounded = {path: float(f"{alpha:.12g}") for path, alpha in exact.items()}
    return {path: int(alpha) if alpha.is_integer() else alpha for path, alpha in rounded.items()}
