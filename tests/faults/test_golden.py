"""Run folders of every released checkpoint format go on; see tests/golden/README.md."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.faults.tiny import relora

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = sorted(path.name for path in GOLDEN.glob("format-*"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the golden folders; their configurations name paths relative to it."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    torch.set_num_threads(1)
    return tmp_path / "golden"


@pytest.mark.parametrize("name", FORMATS)
def test_continues_with_the_figures_of_the_uninterrupted_run(here: Path, name: str) -> None:
    expected = json.loads((here / name / "expected.json").read_bytes())
    ended = relora("pretrain", f"{name}/config.yaml", "--quiet")
    assert ended.status == 0, ended.err
    for file, records in expected.items():
        before, content = (GOLDEN / name / file).read_bytes(), (here / name / file).read_bytes()
        assert content.startswith(before)  # it went on, and did not begin again
        later = [json.loads(line) for line in content[len(before) :].splitlines()]
        if file == "metrics.jsonl":
            assert later.pop()["kind"] == "final"  # which the versions that wrote these folders did not have
        assert len(later) == len(records)
        for there, line in zip(records, later, strict=True):
            # they measured the first held-out tokens, this one measures a sample of all
            trained = {key: figure for key, figure in there.items() if key in ("step", "loss", "grad_norm")}
            assert there.keys() <= line.keys()
            # other processors sum in another order
            assert {key: line[key] for key in trained} == pytest.approx(trained, rel=1e-4)
    assert "held-out figures before and after do not compare" in ended.out + ended.err
    assert records, "the golden run ends with a restart still to come"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_of_the_future_is_refused(here: Path, name: str) -> None:
    manifest = here / name / "checkpoints" / "step-00000008" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"format": 99}))
    for arguments in (["pretrain", f"{name}/config.yaml"], ["export", name, "--checkpoint", 8]):
        assert relora(*arguments).complaint(2, "format 99", "step-00000008") is None
