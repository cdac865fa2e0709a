"""Model folders as files: tensors read one at a time, copies changed in place, nothing left behind where it fails.

The safetensors format keeps every tensor in one piece at a known place, so a tensor of the same type and shape can be
written over without touching the rest. Memory: one tensor, whatever the model.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from relora.adapters.save_load import all_tensors
from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder
from relora.files.untrusted import INDEX_BYTES, check_model_folder, inside, read_json
from relora.lowrank.inject import is_conv1d
from relora.messages import first_line
from relora.model.load import model_folder, open_model

_FLOATS = ("F64", "F32", "F16", "BF16")
"""Types, as safetensors calls them, that something can be added to."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Place:
    """Where a file keeps a tensor."""

    file: Path
    name: str
    begin: int
    """Its first byte."""
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name)
        return tensor

    def write(self, tensor: Tensor, folder: Path) -> None:
        """Put another tensor of this type and shape in its place, in the copy of the file that `folder` has."""
        with (folder / self.file.name).open("r+b") as stream:
            stream.seek(self.begin)
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


class StoredModel:
    """The weights of a model folder, and its shapes as a model without weights.

    Raises:
        UserError: what `open_model` refuses, or weights that are not there.
    """

    def __init__(self, model: str | Path) -> None:
        self.folder = model_folder(model)
        with torch.device("meta"):
            self.model: PreTrainedModel = open_model(self.folder)
        self.files = weight_files(self.folder)
        known = _renamer(self.model)
        self.places = {known(place.name): place for file in self.files for place in _places(file)}
        """By the model's name of a tensor; what is first turned into another, under its own."""
        self._tensors = all_tensors(self.model)

    @property
    def parameters(self) -> int:
        """Of the model, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def place(self, key: str) -> Place:
        """Where the model's tensor `key` is; of tied weights the files hold one."""
        tensor = self._tensors[key]
        for name, other in self._tensors.items():
            if other is tensor and name in self.places:
                return _checked(self.places[name], tuple(tensor.shape))
        raise UserError(
            f"{self.folder}: its files hold no {key}, only what it is made of when the model is opened; "
            "leave that layer out of the adapter"
        )

    def weight(self, path: str) -> Tensor:
        """The weight of a linear layer as [out, in]."""
        weight = self.place(f"{path}.weight").read()
        return weight.T if self.is_transposed(path) else weight

    def is_transposed(self, path: str) -> bool:
        """The weight of a linear layer is kept as [in, out]."""
        return is_conv1d(self.model.get_submodule(path))

    def copy_to(self, folder: Path) -> dict[str, str]:
        """Copy all files of the model; sha256 by name of those with weights."""
        copy_rest(self.folder, folder)
        return {file.name: copied(file, folder / file.name) for file in self.files}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model: those of its index, or the only one."""
    check_model_folder(folder)
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(read_json(index, INDEX_BYTES)["weight_map"].values())
    for name in names:
        if not inside(folder, name).is_file():
            raise UserError(f"{folder}: has no {name}; give a model whose weights are in safetensors")
    return [folder / name for name in sorted(names)]


@contextmanager
def new_model_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends (see `files.atomic`).

    Raises:
        UserError: `out` is there already.
        RunStopped: the disk refuses a write. Nothing is left behind.
    """
    if out.exists():
        raise UserError(f"{out}: is there already and was left as it is; give another --out")
    try:
        with atomic_folder(out, replace=False, parents=True) as partial:
            yield partial
    except OSError as error:
        raise RunStopped(f"{out}: not written ({error.strerror or error}); nothing was left behind") from None


def copy_rest(source: Path, target: Path, *, but: str = "") -> None:
    """Configurations, tokenizer, index: all plain files of a model folder that hold no weights."""
    for file in source.iterdir():
        weights = file.suffix in _WEIGHTS or file.name.endswith(".bin.index.json")
        if file.is_file() and not weights and file.name != but and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def copied(source: Path, target: Path) -> str:
    """Copy a file; its sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as written:
        while chunk := read.read(_CHUNK):
            written.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def sha256(file: Path) -> str | None:
    """Of a file; None if it is not there."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _renamer(model: PreTrainedModel) -> Callable[[str], str]:
    """The model's own name of what its files call otherwise, as transformers finds it when it loads them."""
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def renamed(name: str) -> str:
        key, converted = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            return name
        return name if converted else str(key)

    return renamed


def _places(file: Path) -> Iterator[Place]:
    try:
        with safe_open(file, framework="pt") as opened:  # makes sure that header and length agree
            names = list(opened.keys())
    except SafetensorError as error:
        raise UserError(f"{file}: damaged, or not a safetensors file ({first_line(str(error))})") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for name in names:
        entry = header[name]
        yield Place(file, name, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))


def _checked(place: Place, shape: tuple[int, ...]) -> Place:
    if place.shape != shape:
        there, wanted = list(place.shape), list(shape)
        raise UserError(f"{place.file}: {place.name} is {there} where config.json wants {wanted}")
    if place.dtype not in _FLOATS:
        raise UserError(f"{place.file}: {place.name} is stored as {place.dtype}, which nothing can be added to")
    return place
