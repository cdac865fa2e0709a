"""What `relora adapters` prints for people."""

import pytest
from tests.cli.tables.screen import Screen

from relora.adapters.contents import Summary
from relora.adapters.extract import Extraction
from relora.adapters.merge import MergeReport, UnmergeReport
from relora.adapters.show import Contents, LayerSummary
from relora.cli.tables.adapters import (
    format_decimal_bytes,
    print_contents,
    print_extraction,
    print_list,
    print_merge,
    print_unmerge,
)

FRENCH = Summary("french", "LoRA", [4, 16], ["q_proj", "v_proj"], 12_345, 98_765, "models/base")


def test_a_list_has_one_adapter_in_a_row() -> None:
    screen = Screen()
    torn = Summary("torn", "?", [], [], 0, 12, None, problem="adapter_config.json is no JSON")
    bare = Summary("bare", "LoRA", [8], [], 7, 3_000_000, None)
    print_list([FRENCH, torn, bare], screen)
    header, *rows = (line.split() for line in screen.text.splitlines())
    assert header == ["adapter", "type", "r", "targets", "parameters", "size", "base"]
    assert rows == [
        ["french", "LoRA", "4", "...", "16", "q_proj", "v_proj", "12,345", "98.8", "KB", "models/base"],
        ["torn", "?", "-", "adapter_config.json", "is", "no", "JSON", "-", "12", "bytes", "-"],
        ["bare", "LoRA", "8", "-", "7", "3.0", "MB", "-"],
    ]


def test_contents_are_the_row_of_the_list_the_layers_and_what_was_trained_in_full() -> None:
    screen = Screen()
    layer = LayerSummary("layers.0.q_proj", 32, 64, 4, 16.0, 4.0, 1.23456)
    print_contents(Contents(FRENCH, [layer], {"lm_head": [512, 32]}), screen)
    text = screen.text
    assert text.splitlines()[1].startswith("french") and "norm of the update" in text
    assert "layers.0.q_proj" in text and "32 x 64" in text and "1.235" in text
    assert "trained in full: lm_head (512 x 32)" in text
    assert "it was not checked whether PEFT reads it" in " ".join(text.split())


@pytest.mark.parametrize(
    ("full_tensors", "difference", "lines"),
    [
        (
            2,
            1e-6,
            [
                "out: french merged into 4 layers of base, 2 tensors replaced (1.0 KB)",
                "largest logit difference between base + adapter and merged, on 32 tokens: 1.00e-06",
            ],
        ),
        (0, None, ["out: french merged into 4 layers of base (1.0 KB)", "logits not compared"]),
    ],
)
def test_a_merge(full_tensors: int, difference: float | None, lines: list[str]) -> None:
    screen = Screen(width=40)  # lines are not broken, whatever the width
    print_merge(MergeReport("out", "base", "french", 4, full_tensors, 1000, difference, 32), screen)
    assert screen.text.splitlines() == lines


@pytest.mark.parametrize(("exact", "how"), [(True, "bit for bit"), (False, "every weight within 1.0e-03 of it")])
def test_an_unmerge(exact: bool, how: str) -> None:
    screen = Screen()
    print_unmerge(UnmergeReport("out", "base", "french", exact, 1e-3), screen)
    assert screen.text == f"out: base again without french, {how}"


@pytest.mark.parametrize(("count", "names"), [(4, "w0, w1, w2, w3"), (5, "w0, w1, w2, w3 ...")])
def test_an_extraction_says_what_it_leaves_out(count: int, names: str) -> None:
    screen = Screen()
    left_out = [f"w{index}" for index in range(count)]
    print_extraction(Extraction("out", 4, {"q_proj": 0.5, "v_proj": 0.75}, 0.625, [], left_out), screen)
    lines = screen.text.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["q_proj", "50.0%"],
        ["v_proj", "75.0%"],
        ["all", "2", "layers,", "r", "=", "4", "62.5%"],
    ]
    assert lines[4:] == [f"not in the adapter: {count} other weights that differ ({names})", "out"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (10**6, "1.0 MB"),
        (10**9, "1.0 GB"),
        (10**13, "10000.0 GB"),
    ],
)
def test_sizes_are_in_powers_of_1000(size: int, text: str) -> None:
    assert format_decimal_bytes(size) == text


def test_contents_name_rows_and_copies() -> None:
    screen = Screen(width=40)
    print_contents(Contents(FRENCH, [], {}, ["lm_head.weight"], {"embed_tokens.weight": [3, 5]}), screen)
    assert "rows trained in full: embed_tokens.weight (3, 5)" in screen.text
    assert "a copy of the base's weight: lm_head.weight" in screen.text


def test_contents_say_what_peft_reads_otherwise() -> None:
    for found in ([], ["PEFT 0.21 loads the adapter without them: model.layers.0.mlp.down_proj"]):
        screen = Screen(width=40)
        print_contents(Contents(FRENCH, [], {}, misread_by_peft=found), screen)
        assert [line for line in screen.text.splitlines() if "PEFT" in line] == [f"warning: {one}" for one in found]
