"""Tensors in several files: any number of readers get from any number of writers what they want, or an error."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from relora.errors import UserError
from relora.lowrank.division import Division, Part
from relora.train.checkpoint_parts import file_name, files_of, is_tensor_file, read_tensors, write_tensors

WHOLE = {
    "rows": torch.arange(35.0).view(7, 5),
    "columns": torch.arange(12).view(3, 4).bfloat16(),
    "step": torch.ones(()),
}
DIMS = {"rows": 0, "columns": 1}


def refuse(*_: object) -> Tensor:
    raise AssertionError("nothing is exchanged here")


def parts(rank: int, count: int) -> dict[str, Part]:
    division = Division(rank, count, refuse, refuse, nullcontext)
    return {name: Part(division, dim, WHOLE[name].shape[dim]) for name, dim in DIMS.items()}


def write(folder: Path, writers: int) -> list[Path]:
    """The files of as many writers; what is not divided stands in the first."""
    paths = []
    for rank in range(writers):
        own = parts(rank, writers) if writers > 1 else {}
        tensors = {name: part.own(WHOLE[name]) for name, part in own.items()}
        paths.append(folder / file_name("weights", rank, writers))
        write_tensors(paths[-1], (WHOLE if rank == 0 else {}) | tensors, own)
    return paths


@given(writers=st.integers(1, 9), readers=st.integers(1, 9))
def test_any_number_reads_what_any_number_wrote(
    tmp_path_factory: pytest.TempPathFactory, writers: int, readers: int
) -> None:
    paths = write(tmp_path_factory.mktemp("parts"), writers)
    whole = read_tensors(paths)
    assert whole.keys() == WHOLE.keys() and all(torch.equal(whole[name], WHOLE[name]) for name in WHOLE)
    for rank in range(readers):
        wanted = parts(rank, readers)
        found = read_tensors(paths, lambda name, _, wanted=wanted: wanted.get(name))  # type: ignore[misc]
        for name, part in wanted.items():
            assert torch.equal(found[name], part.own(WHOLE[name])) and found[name].dtype == WHOLE[name].dtype
        assert torch.equal(found["step"], WHOLE["step"])


def test_names_are_a_full_set_or_none() -> None:
    names = [file_name("frozen", rank, 3) for rank in range(3)]
    assert names[0] == "frozen-00001-of-00003.safetensors"
    assert files_of("frozen", ["state.json", *reversed(names)]) == names
    assert files_of("frozen", names[1:]) is None
    assert files_of("frozen", [*names, "frozen.safetensors"]) is None
    assert files_of("weights", names) == []
    assert not any(map(is_tensor_file, ("../frozen.safetensors", "state.json", "frozen-1-of-2.safetensors")))


@pytest.mark.parametrize("harm", ["a part less", "a part twice", "no range", "another dimension", "no JSON"])
def test_what_does_not_fit_together_is_refused(tmp_path: Path, harm: str) -> None:
    paths = write(tmp_path, 3)
    if harm == "a part less":
        paths.pop()
    elif harm == "a part twice":
        paths.append(paths[0])
    else:
        header = {
            "no range": {},
            "another dimension": {name: [1 - dim, 0, 3] for name, dim in DIMS.items()},
            "no JSON": None,
        }[harm]
        save_file(load_file(paths[1]), paths[1], {"parts": "{" if header is None else json.dumps(header)})
    with pytest.raises(UserError, match="cannot be read"):
        read_tensors(paths)
