"""The choice of a device: present devices are found, an absent one is a user error; deterministic sums, peak memory."""

import subprocess
import sys

import pytest
import torch

from relora.device import choose_device, deterministic, peak_memory_bytes
from relora.errors import UserError


def test_auto_is_the_first_gpu_or_the_cpu() -> None:
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    if not torch.backends.mps.is_available():
        assert str(choose_device("auto")) == expected
    assert choose_device("cpu").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(UserError, match=r"cuda:1 was asked for, but .*device: auto"):
        choose_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", ""])
def test_a_name_that_is_no_device(name: str) -> None:
    with pytest.raises(UserError, match="none of auto, cpu, cuda"):
        choose_device(name)


def test_deterministic_sums_are_set_on_a_gpu_and_only_inside_the_block() -> None:
    memory = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(torch.device("cuda")):  # sets torch's flags, for which no GPU is needed
        assert torch.are_deterministic_algorithms_enabled() and not memory.fill_uninitialized_memory
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert (torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory) == before == (False, True)


def test_an_operation_without_a_deterministic_version_is_named() -> None:
    numbers, at = torch.zeros(3), torch.tensor([0])
    said = r"^deterministic: put_ .*; set `deterministic: false` to do without$"
    with pytest.raises(UserError, match=said), deterministic(torch.device("cuda")):
        numbers.put_(at, torch.ones(1))
    assert not torch.are_deterministic_algorithms_enabled()
    late = "torch wants CUBLAS_WORKSPACE_CONFIG=:4096:8 .* before the process begins"
    with pytest.raises(UserError, match=late), deterministic(torch.device("cuda")):
        raise RuntimeError("... you must set an environment variable ...: CUBLAS_WORKSPACE_CONFIG=:4096:8 or ...")
    with pytest.raises(RuntimeError, match="another"), deterministic(torch.device("cuda")):
        raise RuntimeError("another")


def test_peak_memory_is_of_this_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    torch.ones(2**26)  # 256 MiB
    assert before > 10 * 2**20
    assert peak_memory_bytes(torch.device("cpu")) >= before


def test_peak_memory_does_not_begin_with_the_parents() -> None:
    """The peak of a child of a large process, whose `getrusage` begins with the parent's peak."""
    ballast = torch.ones(2**27)  # 512 MiB
    code = "import torch; from relora.device import peak_memory_bytes; print(peak_memory_bytes(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < ballast.nbytes <= peak_memory_bytes(torch.device("cpu"))
