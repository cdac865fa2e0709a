"""Odd configurations, overrides and command lines."""

import copy
import math
from pathlib import Path
from typing import Any

import typer
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tests.faults.tiny import contents, relora
from tests.fuzz.bench import VALID, Bench, complaint_of

from relora.cli import app
from relora.config import parse_config, to_yaml

SNIPPETS = (
    *("\t", "\0", "\ufeff", "\x85", "\u2028", "%YAML 9.9\n", "---\n", "...\n", "? ", ": :", "- ", "*x", "<<: *x", "|"),
    *("!!python/object/apply:os.system [ls]", "!!int abc", "!!timestamp foo", "!!binary ???", "!!set {a, b}", "!x y"),
    *("&a [*a]", "2024-13-45", "2024-01-01", "1:2:3", "0o9", "0x" + "f" * 3000, "9" * 5000, "1e999", "-.inf", ".nan"),
    *("[" * 400, "{a: " * 400, '"\\ud800"', '"\\0"', "'", '"', "{", "}", "]", "#", "yes", "~", "", " " * 500),
    *("a: 1\na: 2", "\n" * 50, "é", "\U0001f600", "\x1b[31m", "x" * 400, "!!bool maybe", "!!float x", "? [a]\n: b"),
)
"""Pieces of YAML that are wrong, rare or long."""

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 10**15, 10**16, 2**63, 2**64, -(2**70), 10**400]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e-320, 1.7e308, 0.0, -0.0]),
)
ODD_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=30) | st.sampled_from(SNIPPETS) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
RESOLVED = yaml.safe_load(to_yaml(parse_config(VALID)))
"""Every key with a value that is right."""
KEYS = [(key,) for key in RESOLVED] + [
    (section, key) for section, keys in RESOLVED.items() if isinstance(keys, dict) for key in keys
]
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037")

Change = tuple[str, tuple[str, ...], Any]
"""What to do, at which key, with which value."""


@st.composite
def config_files(draw: st.DrawFn) -> bytes:
    """Bytes of a file near a valid configuration, or nowhere near one."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
    tree = copy.deepcopy(draw(st.sampled_from([VALID, RESOLVED])))
    for change in draw(st.lists(_changes(), min_size=1, max_size=3)):
        _apply(tree, change)
    text = yaml.safe_dump(
        tree, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.sampled_from([None, True]))
    )
    for snippet in draw(st.lists(st.sampled_from(SNIPPETS), max_size=2) if draw(st.booleans()) else st.just([])):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + snippet + text[at:]
    return text.encode(draw(st.sampled_from(ENCODINGS)), "replace")


def _changes() -> SearchStrategy[Change]:
    odd_keys = st.text(max_size=10) | st.integers() | st.none() | st.booleans() | st.floats() | st.dates()
    return st.one_of(
        st.tuples(st.just("set"), st.sampled_from(KEYS), ODD_VALUES),
        st.tuples(st.just("set"), st.sampled_from(KEYS), NUMBERS),
        st.tuples(st.just("delete"), st.sampled_from(KEYS), st.none()),
        st.tuples(st.just("rename"), st.sampled_from(KEYS), odd_keys),
        st.tuples(st.just("misspell"), st.sampled_from(KEYS), st.integers(0, 8)),
    )


def _apply(tree: dict[Any, Any], change: Change) -> None:
    action, (*sections, key), value = change
    for section in sections:
        tree = tree[section] if isinstance(tree.get(section), dict) else tree.setdefault(section + "_", {})
    match action:
        case "set":
            tree[key] = value
        case "delete":
            tree.pop(key, None)
        case "rename":
            tree[value] = tree.pop(key, 1)
        case "misspell":
            tree[key[:value] + key[value + 1 :]] = tree.pop(key, 1)


def judge_config(content: bytes, bench: Bench) -> str | None:
    """`relora config` on a file: what it prints is read back to the same, or one line that names the file."""
    Path("c.yaml").write_bytes(content)
    ended = relora("config", "c.yaml")
    if ended.status:
        return complaint_of(ended, "c.yaml")
    Path("again.yaml").write_text(ended.out, encoding="utf-8")
    again = relora("config", "again.yaml")
    return None if again.out == ended.out else f"its output is read back otherwise: {again}"


@st.composite
def override_lists(draw: st.DrawFn) -> list[str]:
    """One to three overrides, most of them of keys that there are."""
    overrides = []
    for _ in range(draw(st.integers(1, 3))):
        dotted = ".".join(draw(st.sampled_from(KEYS)))
        at = draw(st.integers(0, len(dotted)))
        key = draw(
            st.one_of(
                st.just(dotted),
                st.just(dotted),
                st.just(dotted[:at] + dotted[at + 1 :]),
                st.just(f"{dotted}.{dotted}"),
                st.text(max_size=12),
                st.sampled_from(
                    ["", ".", "..", "a" * 300, "a." * 200, "\udcff", "0", "data.train.0.path", "-x", "--x"]
                ),
            )
        )
        value = draw(st.one_of(st.sampled_from(SNIPPETS), ODD_VALUES.map(_spelt), st.text(max_size=20)))
        overrides.append(key + draw(st.sampled_from(["=", "=", "=", "=", "", "==", ": "])) + value)
    return overrides


def _spelt(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def judge_overrides(overrides: list[str], bench: Bench) -> str | None:
    """`relora config c.yaml OVERRIDES`: settings that can be read back, or one line."""
    ended = relora("config", "c.yaml", *overrides)
    return complaint_of(ended) or (judge_config(ended.out.encode(), bench) if ended.status == 0 and ended.out else None)


_COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
VERBS = [verb for verb in _COMMANDS if verb != "doctor"]  # which looks at the machine, for a second each time
OPTIONS = {
    verb: [name for option in _COMMANDS[verb].params for name in option.opts if name[0] == "-"] for verb in VERBS
}
PLACES = (
    "docs.txt",
    "docs.jsonl",
    "c.yaml",
    "prepared/train",
    "prepared",
    "model",
    "run",
    ".",
    "",
    "nowhere",
    "no/such/place",
)
WORDS = (
    *(
        "0",
        "1",
        "-1",
        "2",
        "258",
        "300",
        "1e3",
        "nan",
        "inf",
        "1e-300",
        "10%",
        "100%",
        "99999999999999999999",
        "9" * 5000,
    ),
    *(
        "--",
        "-",
        "--help",
        "-h",
        "x",
        "a=b",
        "seed=1",
        "text",
        "cpu",
        "cuda:99",
        "fp32",
        "fp16",
        "\udcff",
        "\0",
        "é",
        "*",
    ),
    *("x" * 90, "../..", "/proc/self/mem", "~", "-o", "--out=out"),
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A verb with its own options and others', and arguments of every kind."""
    verb = draw(st.sampled_from([*VERBS, *VERBS, "x", "", "--version", "Pretrain"]))
    value = st.sampled_from(PLACES) | st.sampled_from(WORDS)
    words = [draw(value)] if draw(st.integers(0, 3)) else []
    all_options = sorted({option for options in OPTIONS.values() for option in options})
    own = OPTIONS.get(verb) or all_options
    for _ in range(draw(st.integers(0, 4))):
        words.append(draw(st.sampled_from([*own, *own, draw(st.sampled_from(all_options))])))
        if draw(st.integers(0, 4)):
            words.append(draw(value))
    if verb == "prepare" and draw(st.booleans()):
        words += ["--out", "out", "--train-tokenizer", "260"]
    return [verb, *words]


def judge_command(words: list[str], bench: Bench) -> str | None:
    """The command among inputs of every kind: status 0 or 2, and the inputs are as they were."""
    scratch = Path.cwd()
    Path("docs.txt").write_text("a page of words, and words again\n" * 20)
    Path("docs.jsonl").write_text('{"text": "a page of words"}\n' * 9)
    (scratch / "prepared").symlink_to(bench.data)
    (scratch / "model").symlink_to(bench.run.folder / "model")
    Path("run").mkdir()
    folders = (scratch, bench.data, bench.run.folder / "model")
    before = [contents(folder) for folder in folders]
    ended = relora(*words)
    after = [contents(folder) for folder in folders]
    changed = [name for was, now in zip(before, after, strict=True) for name in was if now.get(name) != was[name]]
    return f"changed {changed}" if changed else complaint_of(ended)
