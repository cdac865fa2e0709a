import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from relora.errors import RunStopped, UserError
from relora.report.html import script_json, write_report
from relora.report.metrics import read_json_lines

MakeRun = Callable[..., Path]
HOSTILE = """</script><script>alert(1)</script><img src=x onerror="alert('2')"> $title {0} %s & "quoted" \u2028"""


class Page(HTMLParser):
    """Parser that collects elements, text, and the text of scripts separately, as a browser would."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.cells: list[str] = []
        self.figures = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        self._inside = "figures" if ("id", "figures") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "figures":
            self.figures += data
        elif self._inside not in ("script", "style"):
            self.text += data
        if self._inside == "td":
            self.cells.append(data)


def test_the_report_of_a_finished_run(tmp_path: Path, make_run: MakeRun) -> None:
    path = write_report(make_run(tmp_path / "shakespeare"))
    assert path == tmp_path / "shakespeare" / "report.html"
    page = Page(path)
    assert "Held-out perplexity 23.28 (200,000 tokens) after 16,384,000 tokens in 0:11:08 of training." in page.text
    assert "Not finished" not in page.text
    for text in ("9,437,184", "relora", "llama-9m", "The morning was cold", "total_steps: 2000", "torch: 2.13.0"):
        assert text in page.text
    assert page.cells[:6] == ["warm start", "0 to 500", "4,096,000", "10,404.57", "39.63", "-99.6 %"]
    first_restart = page.cells[7 * 6 : 7 * 6 + 11]
    measured = ["1", "750", "3.4577", "3.4577", "28.47", "28.47", "0.1048", "31.0 of 64", "+0.006", "noise", "0.3"]
    assert first_restart == measured
    assert "After the switch to low rank at step 509 the training loss did not rise (" in page.text
    assert "loss spike" not in page.text
    assert "Not finite" not in page.text
    assert set(json.loads(page.figures)) == {"loss", "perplexity", "rate", "speed", "gradient", "spectrum"}
    assert page.tags.count("figure") == 6


def test_figures_of_a_sample_are_labelled_and_the_headline_is_of_the_whole(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path)
    records = read_json_lines(folder / "metrics.jsonl")
    for record in records:
        if record["kind"] == "evaluation":
            record |= {"sample": True, "whole_tokens": 1_000_000}
    last = next(record for record in reversed(records) if record["kind"] == "evaluation")
    final = {"kind": "final", "validation_loss": 3.0, "validation_tokens": 1_000_000, "sample": False}

    def written(*more: dict[str, Any]) -> Page:
        lines = "".join(json.dumps(record) + "\n" for record in [*records, *more])
        (folder / "metrics.jsonl").write_text(lines)
        return Page(write_report(folder))

    page = written()
    assert "Held-out perplexity 23.28 (sample of 200,000 of 1,000,000 tokens) after" in page.text
    assert "held-out (sample)" in page.text and "Held-out perplexity (sample)" in page.text
    page = written(last | final)
    assert "Held-out perplexity 20.09 (all 1,000,000 tokens) after" in page.text  # exp(3)
    note = "Held-out figures in training are of a sample of 200,000 of 1,000,000 tokens, the same ones at every"
    assert f"{note} measurement. The figure at the top is of the result on the whole." in page.text
    phases = page.cells[6 * 7 - 6 : 6 * 7]
    assert phases[4] == "23.28"  # the curve and the phases do not mix the two


def test_it_is_one_file_that_loads_nothing(tmp_path: Path, make_run: MakeRun) -> None:
    path = write_report(make_run(tmp_path))
    page = Page(path)
    assert page.addresses == []
    assert "link" not in page.tags
    assert "plotly.js v" in path.read_text(encoding="utf-8")
    assert "default-src 'none'" in path.read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.partial"))


def test_every_color_of_a_figure_is_a_variable_of_both_themes(tmp_path: Path, make_run: MakeRun) -> None:
    html = write_report(make_run(tmp_path)).read_text(encoding="utf-8")
    used = set(re.findall(r'"(--[a-z-]+)"', Page(tmp_path / "report.html").figures))
    light, dark = (set(re.findall(r"(--[a-z-]+):", block)) for block in re.findall(r":root \{(.*?)\}", html, re.S))
    assert used
    assert used <= light == dark


@pytest.mark.parametrize("steps", [20, 300, 500, 740, 760])
def test_the_report_of_an_unfinished_run(tmp_path: Path, make_run: MakeRun, steps: int) -> None:
    page = Page(write_report(make_run(tmp_path, steps=steps)))
    assert f"Not finished: step {steps:,} of 2,000." in page.text


def test_the_report_of_a_run_of_method_full(tmp_path: Path, make_run: MakeRun) -> None:
    page = Page(write_report(make_run(tmp_path, method="full")))
    assert "Restarts" not in page.text
    assert page.cells[0] == "full rank"


def test_spikes_and_incidents_are_shown(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path, steps=1500)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and 1000 < record["step"] <= 1040:
            record["loss"] += 1.0
    where = {"phase": "low_rank", "cycle": 3, "batch": "batch 1255, sequences 3 to 5"}
    records += [
        {"kind": "skipped", "step": 1255, "tokens": 1, **where, "loss": None, "grad_norm": None},
        {"kind": "rewind", "step": 1250, "tokens": 1, **where, "failed_step": 1256},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report(folder))
    start = 5 * 6 + 11
    assert page.cells[start : start + 2] == ["2", "1,000"]
    rise, back = page.cells[start + 8 : start + 10]
    assert rise.startswith(("+0.9", "+1.0", "+1.1"))
    assert rise.endswith("\N{BLACK DOWN-POINTING TRIANGLE}")
    assert 50 <= int(back) <= 90
    assert page.cells[-10:] == [
        *("1,255", "step left out", "-", "-", "batch 1255, sequences 3 to 5"),
        *("1,250", "gone back to this step, from step 1,256", "-", "-", "batch 1255, sequences 3 to 5"),
    ]
    assert "loss spike" in page.text
    assert "step left out or gone back to" in page.text


def test_hostile_strings_stay_text(tmp_path: Path, make_run: MakeRun) -> None:
    folder = make_run(tmp_path, steps=1000)
    plain = Page(write_report(folder))
    (folder / "config.yaml").write_text(json.dumps({"method": HOSTILE, "model": {"preset": HOSTILE}}))
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE, "parameters": HOSTILE}))
    (folder / "samples.json").write_text(json.dumps([{"step": HOSTILE, "prompt": HOSTILE, "text": HOSTILE + HOSTILE}]))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records[-20:]:
        record |= dict.fromkeys(("phase", "loss", "lr", "grad_norm", "validation_loss", "tokens_per_second"), HOSTILE)
    records.append(records[-1] | {"kind": "skipped", "batch": HOSTILE})
    records.append(records[-1] | {"kind": "rewind", "failed_step": HOSTILE, "step": 10**400, "loss": 10**400})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    restart = json.loads((folder / "restarts.jsonl").read_text().splitlines()[0])
    restart |= dict.fromkeys(("loss_before", "loss_after", "seconds", "optimizer"), HOSTILE)
    restart["layers"][0] = dict.fromkeys(("name", "update_norm", "effective_rank"), HOSTILE)
    restart["layers"][1]["singular_values"][3] = HOSTILE
    (folder / "restarts.jsonl").write_text(json.dumps(restart) + "\n")
    page = Page(write_report(folder))
    assert page.text.count("alert(1)") >= 6
    assert page.addresses == []
    assert page.tags.count("script") == plain.tags.count("script") == 3
    assert "img" not in page.tags


def test_a_folder_with_a_hostile_name(tmp_path: Path, make_run: MakeRun) -> None:
    page = Page(write_report(make_run(tmp_path / "<script>alert(1)<", steps=100)))
    assert page.tags.count("script") == 3
    assert "<script>alert(1)<" in page.text


def test_script_json_cannot_end_its_script_and_reads_back() -> None:
    value = {"a": [HOSTILE, "<!--", 1.5, None]}
    assert "<" not in script_json(value)
    assert json.loads(script_json(value)) == value


def test_an_old_report_is_replaced_and_one_that_cannot_be_written_is_one_line(
    tmp_path: Path, make_run: MakeRun
) -> None:
    folder = make_run(tmp_path, steps=100)
    (folder / "report.html").write_text("old")
    assert write_report(folder).read_text(encoding="utf-8")[:3] != "old"
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    with pytest.raises(RunStopped, match=r"report\.html: cannot be written: Is a directory"):
        write_report(folder)
    assert not list(folder.glob("*.partial"))


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
