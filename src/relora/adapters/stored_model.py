"""The weights of a model folder, read from its files one tensor at a time, and changed in copies of these files.

The safetensors format stores every tensor as contiguous bytes at an offset that the file's header gives, so a tensor
can be overwritten by another one of the same dtype and shape while the rest of the file stays as it is. Memory holds
one tensor at a time, however large the model is.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, Split, WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import CHAT_TEMPLATE_DIR

from relora.adapters.compatibility import all_tensors, tied_groups
from relora.errors import RunStopped, UserError
from relora.files.atomic import atomic_folder
from relora.files.untrusted import INDEX_BYTES, check_model_folder, inside, read_json
from relora.lowrank.targets import is_conv1d
from relora.messages import first_line
from relora.model.load import model_folder, open_model

_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
"""File that says which weight file holds a tensor, where there are several."""

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Dtypes, under safetensors' names, to which an update can be added, with the bytes of a number."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of files that may hold weights, of whatever library."""
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file, as the file's header describes it."""

    file: Path
    name: str
    """Name in the file, which may differ from the name in the model."""
    first_byte: int
    """Offset of its first byte in the file."""
    dtype: str
    """Dtype under safetensors' name, such as `BF16`."""
    shape: tuple[int, ...]
    first_row: int | None = None
    """First of the rows of the stored tensor that this one is, if it is a part of it."""

    def read(self) -> Tensor:
        """Read the tensor from the file to the CPU."""
        with safe_open(self.file, framework="pt") as opened:
            if self.first_row is None:
                tensor: Tensor = opened.get_tensor(self.name)
            else:
                tensor = opened.get_slice(self.name)[self.first_row : self.first_row + self.shape[0]]
        return tensor

    def rows(self, first: int, shape: tuple[int, ...]) -> "StoredTensor":
        """Return the part of the tensor that has the given shape and begins at row `first`."""
        bytes_per_row = _BYTES[self.dtype] * math.prod(self.shape[1:])
        return replace(self, first_byte=self.first_byte + first * bytes_per_row, shape=shape, first_row=first)

    def write(self, tensor: Tensor, folder: Path) -> None:
        """Overwrite the tensor by another one of the same dtype and shape, in the copy of the file in `folder`."""
        with (folder / self.file.name).open("r+b") as stream:
            stream.seek(self.first_byte)
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


class StoredModel:
    """A model folder: the model on the meta device, which has shapes but no weights, and its weights in the files.

    Args:
        model: folder or hub id.

    Raises:
        UserError: `open_model` refuses the folder, or files with weights are missing or damaged.
    """

    def __init__(self, model: str | Path) -> None:
        self.folder = model_folder(model)
        with torch.device("meta"):
            self.model: PreTrainedModel = open_model(self.folder)
        self.files = weight_files(self.folder)
        named = _namer(self.model)
        self.tensors = {
            name: tensor for file in self.files for one in _read_header(file) for name, tensor in named(one).items()
        }
        """Stored tensors by their name in the model, and the parts of those whose rows transformers deals out to
        several parameters; those that it converts otherwise when it opens the model (merges experts, say) stand under
        their name in the file."""
        self._untie()
        self._tensors = all_tensors(self.model)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _untie(self) -> None:
        """Untie weights that the configuration ties and the files hold with two values, as transformers does."""
        for first, *others in tied_groups(self.model):
            for name in others:
                pair = [self.tensors.get(key) for key in (first, name)]
                if all(pair) and not torch.equal(*(one.read() for one in pair if one)):
                    path, _, parameter = name.rpartition(".")
                    module = self.model.get_submodule(path)
                    module.register_parameter(
                        parameter, nn.Parameter(torch.empty_like(module.get_parameter(parameter)))
                    )

    def find(self, key: str) -> StoredTensor:
        """Find the model's tensor `key` in the files; tied weights are stored under one of their names only.

        Raises:
            UserError: the files hold the tensor in another form, in another shape or in a dtype that is not floating
                point.
        """
        tensor = self._tensors[key]
        names = [key, *(name for name, other in self._tensors.items() if other is tensor)]
        for name in names:
            if name in self.tensors:
                return _checked(self.tensors[name], tuple(tensor.shape))
        raise UserError(
            f"{self.folder}: its files hold no {key}, only what it is made of when the model is opened; "
            "leave that layer out of the adapter"
        )

    def weight(self, path: str) -> Tensor:
        """Read the weight [out, in] of the linear layer at `path`."""
        weight = self.find(f"{path}.weight").read()
        return weight.T if self.is_transposed(path) else weight

    def is_transposed(self, path: str) -> bool:
        """Tell whether the weight of the linear layer at `path` is stored as [in, out] (GPT-2's `Conv1D`)."""
        return is_conv1d(self.model.get_submodule(path))

    def copy_to(self, folder: Path) -> dict[str, str]:
        """Copy all files of the model into `folder`, and return the sha256 of those with weights by their name.

        What of the folder is not copied is logged.
        """
        weights = {file.name for file in self.files}
        left_out = [name for name in copy_without_weights(self.folder, folder) if name not in weights]
        if left_out:
            _log.warning("warning: %s: not copied: %s", self.folder, ", ".join(left_out))
        if [file.name for file in self.files] == ["model.safetensors"]:
            (folder / INDEX).unlink(missing_ok=True)  # it names other files, which transformers does not read
        return {file.name: copy_and_hash(file, folder / file.name) for file in self.files}


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files with the weights of a model: `model.safetensors`, or else those that its index names.

    Where both are there, transformers reads the one file.

    Raises:
        UserError: a file is missing, or the folder holds what `relora.files.untrusted` refuses.
    """
    check_model_folder(folder)
    index = folder / INDEX
    names = {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():
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


def copy_without_weights(source: Path, target: Path, *, exclude: str = "") -> list[str]:
    """Copy the files of a model folder that hold no weights: configurations, tokenizer, index of safetensors, code.

    Hidden files and the file named `exclude` are left out. Of folders, only that of further chat templates is copied.

    Returns:
        The names of other files with weights and of folders, which were not copied.
    """
    left_out = []
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or file.name == exclude:
            continue
        if file.is_dir() and file.name != CHAT_TEMPLATE_DIR:
            left_out.append(f"{file.name}/")
        elif file.is_dir():
            (target / file.name).mkdir()
            for template in file.glob("*.jinja"):
                shutil.copyfile(template, target / file.name / template.name)  # `check_folder` has seen its links
        elif file.suffix in _WEIGHTS or file.name.endswith(".bin.index.json"):
            left_out.append(file.name)
        elif file.is_file():
            shutil.copyfile(file, target / file.name)
    return left_out


def copy_and_hash(source: Path, target: Path) -> str:
    """Copy a file and return the sha256 of its content."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            digest.update(chunk)
    return digest.hexdigest()


def sha256(file: Path) -> str | None:
    """Return the sha256 of a file's content; None if there is no such file."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _namer(model: PreTrainedModel) -> Callable[[StoredTensor], dict[str, StoredTensor]]:
    """Return a function from a tensor in the files to the tensors of the model that it holds, by their names there.

    It renames as transformers does when it loads the files; a tensor that transformers converts keeps its name, unless
    its rows are dealt out to several parameters.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix

    def named(stored: StoredTensor) -> dict[str, StoredTensor]:
        key, pattern = rename_source_key(stored.name, renamings, converters, prefix, state)
        if key not in state and stored.name in state:
            return {stored.name: stored}
        if pattern is None:
            return {str(key): stored}
        converter = next(one for one in converters if pattern in one.source_patterns)
        return _parts(stored, str(key), converter, state) or {stored.name: stored}

    return named


def _parts(
    stored: StoredTensor, key: str, converter: WeightConverter, state: Mapping[str, Tensor]
) -> dict[str, StoredTensor]:
    """Return the parameters to which transformers deals out the rows of a stored tensor; none if it does otherwise.

    Args:
        key: name of the first of them.
        state: the model's own tensors by name.
    """
    first, *others = converter.target_patterns
    operations = converter.operations
    if not others or stored.dtype not in _BYTES or len(operations) != 1:
        return {}
    if not isinstance(operations[0], Chunk | Split) or operations[0].dim or len(converter.source_patterns) > 1:
        return {}
    names = [key.replace(first, target) for target in converter.target_patterns]
    shapes = [tuple(state[name].shape) for name in names if name in state]
    if len(shapes) < len(names) or sum(shape[0] for shape in shapes) != stored.shape[0]:
        return {}
    starts = accumulate((shape[0] for shape in shapes), initial=0)
    return {name: stored.rows(start, shape) for name, shape, start in zip(names, shapes, starts, strict=False)}


def _read_header(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a safetensors file from its header; `UserError` if the file is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:  # checks that the header and the file's length agree
            names = list(opened.keys())
    except SafetensorError as error:
        raise UserError(f"{file}: damaged, or not a safetensors file ({first_line(str(error))})") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for name in names:
        entry = header[name]
        yield StoredTensor(file, name, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))


def _checked(stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """Return the stored tensor; `UserError` unless it has the model's shape and a floating-point dtype."""
    if stored.shape != shape:
        sides = f"{list(stored.shape)} where config.json wants {list(shape)}"
        raise UserError(f"{stored.file}: {stored.name} is {sides}")
    if stored.dtype not in _BYTES:
        raise UserError(f"{stored.file}: {stored.name} is stored as {stored.dtype}, which nothing can be added to")
    return stored
