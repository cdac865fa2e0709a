"""The diagnosis can be written as JSON, describes this machine, and its warnings agree with its figures."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from relora.planning.doctor import diagnose


@pytest.fixture(scope="module")
def diagnosis():
    return diagnose()


def test_it_is_json_and_of_this_machine(diagnosis) -> None:
    found = json.loads(json.dumps(asdict(diagnosis)))
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert 0 < found["memory_free_bytes"] <= found["memory_total_bytes"]
    assert found["disk_free_bytes"] > 0
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert found["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")


def test_dtypes_are_measured(diagnosis) -> None:
    assert diagnosis.dtypes["fp32"].gflops > 0.1
    assert diagnosis.dtypes["fp32"].ratio_to_fp32 == 1
    bf16 = diagnosis.dtypes["bf16"]
    assert bf16.ratio_to_fp32 == pytest.approx(bf16.gflops / diagnosis.dtypes["fp32"].gflops)
    slow = any("bf16 products" in warning for warning in diagnosis.warnings)
    assert slow == (bf16.ratio_to_fp32 < 0.8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_machine_without_gpu_is_told_so(diagnosis) -> None:
    assert any("CPU" in warning for warning in diagnosis.warnings)


def test_threads_below_cores_are_a_warning(diagnosis) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        warned = any("PyTorch uses 1 of" in warning for warning in diagnose().warnings)
    finally:
        torch.set_num_threads(threads)
    assert warned == (diagnosis.cpu_cores > 1 and diagnosis.device == "cpu")


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert diagnose(tmp_path / "runs" / "new").disk_free_bytes > 0
    assert list(tmp_path.iterdir()) == []
