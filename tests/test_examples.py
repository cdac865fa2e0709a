"""The examples run as they stand and do what they claim."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_plain_loop(tmp_path: Path) -> None:
    """Four stretches, each better than the one before; restarts that move nothing; a plain model at the end."""
    # from another folder, since an example must not depend on where it is started
    command = [sys.executable, "-W", "error", str(EXAMPLES / "plain_loop.py")]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    losses = [float(loss) for loss in re.findall(r"mean loss since the last boundary ([\d.]+)", printed.stdout)]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2
    moved = [float(figure) for figure in re.findall(r"the output moved by (\S+) at most", printed.stdout)]
    assert len(moved) == 3 and max(moved) < 1e-4
    assert "merged: embed.weight, hidden.weight" in printed.stdout and "lora_" not in printed.stdout
    assert printed.stderr == "" and not list(tmp_path.iterdir())
