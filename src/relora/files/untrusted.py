"""Files and folders that somebody else may have made: plain, bounded, and no way out of their folder.

Refused in one line, before a library sees them:

- a name in an index, or a link, that leads out of the folder (a hub snapshot's links into its own `blobs` are in order)
- a pipe or a device in place of a file: a reader would wait for ever
- a file, a safetensors header or a nesting too large to be honest
- keys by which a configuration names code to import or a kernel to download, and YAML's tags, bombs and twin keys
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from relora.errors import UserError
from relora.messages import short_repr

MB = 1 << 20
YAML_BYTES = 64 << 10
"""Of a configuration; one with every key is 3 KB. The parser takes up to 0.7 s for so much."""
DEPTH = 20
"""Levels of sections in a configuration."""
CONFIG_BYTES = {
    "config.json": MB // 4,
    "generation_config.json": MB // 4,
    "tokenizer_config.json": 4 * MB,  # the largest list every added token, in about 1 MB
}
"""Of the configurations in a model folder; transformers takes seconds for a megabyte of small entries."""
INDEX_BYTES = 10 * MB
"""Of an index of weights: that of 671 billion parameters has 9 MB."""
TOKENIZER_BYTES = 48 * MB
"""Of a vocabulary: those of 260,000 ids have about 35 MB."""
HEADER_BYTES = 4 * MB
"""Of a safetensors file: about 30,000 tensors."""

_BUILT_IN = (
    *(None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    *("batched_mm", "grouped_mm"),
)
"""Implementations of attention and experts that are part of transformers; any other is code from the hub."""
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_QUANTIZED = ("quantization_config", "compression_config")
_IGNORED_PATHS = ("tokenizer_file", "special_tokens_map_file")
"""Where a tokenizer was once saved: transformers does not follow these."""


def regular_file(file: Path, most_bytes: int | None = None) -> Path:
    """The file, if it is one and no larger; `OSError` where it is not there, `UserError` for anything else."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: cannot be read: not a regular file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise UserError(f"{file}: {status.st_size:,} bytes; such a file has at most {most_bytes:,}")
    return file


def no_address(name: str) -> str:
    """A path or a hub id as it was given; `ValueError`, which does not repeat it, for a web address.

    Nothing here is fetched by address, and people write their access tokens into them.
    """
    if "://" in name:
        raise ValueError("a web address cannot be used; give a folder or a hub id (owner/name)")
    return name


def read_json(file: Path, most_bytes: int = 4 * MB) -> Any:
    """What a JSON file holds; `OSError` where it cannot be read, `UserError` where it is not JSON of that size."""
    data = regular_file(file, most_bytes).read_bytes()
    try:
        return json.loads(data)
    except RecursionError:
        raise UserError(f"{file}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None


def inside(folder: Path, name: object) -> Path:
    """The file that an index or a manifest of `folder` calls `name`; `UserError` unless it lies in the folder itself.

    Such files name their neighbours, so a separator is refused too, not only `..`.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
        raise UserError(f"{folder}: names {short_repr(name)}, which is not a file of this folder")
    _check_entry(folder / name, _allowed_roots(folder))
    return folder / name


def check_folder(folder: Path) -> None:
    """`UserError` if anything in a folder, at any depth, is a link that leads out of it or neither file nor folder.

    A link out would put a file of the reader's machine into a model that he passes on, or write over one.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is not a folder")
    roots = _allowed_roots(folder)
    waiting = [folder]
    while waiting:
        with contextlib.suppress(FileNotFoundError):  # of a run that is going on, and just dropped a checkpoint
            for entry in waiting.pop().iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    waiting.append(entry)
                else:
                    _check_entry(entry, roots)


def check_model_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """`UserError` if transformers, given this folder, would leave it, run code, or read more than is honest.

    What `auto_map` of config.json names is left alone: transformers passes over it unless it is told to trust it
    (see `remote_code`), and many models of its own carry one.
    """
    check_folder(folder)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            check_header(file)
        elif file.suffix in (".json", ".txt", ".model", ".jinja") and file.is_file():
            regular_file(file, TOKENIZER_BYTES)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter (adapter_config.json); merge it into its model first")
    for file in folder.glob("*.index.json"):
        _check_index(file)
    for name, most_bytes in CONFIG_BYTES.items():
        if (folder / name).exists():
            tree = read_json(folder / name, most_bytes)
            if not isinstance(tree, dict):
                raise UserError(f"{folder / name}: not a JSON object")
            _check_keys(tree, folder / name, trust_remote_code)


def remote_code(folder: Path) -> list[str]:
    """The files whose code a trusting transformers runs with this folder: `name.py`, or `owner/name--name.py`."""
    named = set()
    for name in ("config.json", "tokenizer_config.json"):
        tree = read_json(folder / name, CONFIG_BYTES[name]) if (folder / name).exists() else {}
        for _, key, value in _items(tree):
            if key == "auto_map":
                classes = [reference for _, _, reference in _items({"": value}) if isinstance(reference, str)]
                named |= {f"{reference.rpartition('.')[0]}.py" for reference in classes}
    if (folder / "custom_generate" / "generate.py").exists():
        named.add("custom_generate/generate.py")
    return sorted(named)


def read_yaml(file: Path) -> Any:
    """What a YAML file holds; `OSError` where it cannot be read, `UserError` for all that is wrong in it."""
    data = regular_file(file, YAML_BYTES).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error.reason} at byte {error.start:,}") from None
    return parse_yaml(text, str(file))


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text holds, in plain values; `source` names it in messages.

    Beyond `yaml.safe_load`: no key twice in a section (YAML takes the last), at most `DEPTH` levels, and an alias may
    stand for a value but not for a section or list, which can be made to multiply without end.
    """
    try:
        return _PlainLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"{source}{line}: not valid YAML: {str(error.problem)[:120]}") from None
    except (yaml.YAMLError, ValueError, OverflowError, KeyError, AttributeError) as error:  # a tag on what it cannot be
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())[:120]}") from None


class _PlainLoader(yaml.SafeLoader):
    """See `parse_yaml`; what is refused is refused while nodes are composed, before any value is made."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) and not isinstance(self.anchors.get(event.anchor), yaml.ScalarNode):
            self._refuse(f"the alias *{event.anchor} stands for no plain value", event.start_mark)
        if self._depth > DEPTH:
            self._refuse(f"more than {DEPTH} levels", event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    self._refuse(f"the key `{key.value}` stands twice in one section", key.start_mark)
                seen.add(key.value)
        return node

    def _refuse(self, problem: str, mark: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _allowed_roots(folder: Path) -> list[str]:
    """Where a folder's links may lead: into itself, and of a hub snapshot (`REPO/snapshots/COMMIT`) into REPO/blobs."""
    real = Path(os.path.realpath(folder))
    return [str(real)] + ([str(real.parent.parent / "blobs")] if real.parent.name == "snapshots" else [])


def _check_entry(entry: Path, roots: list[str]) -> None:
    """`UserError` for a link that leads elsewhere, and for what is neither file nor folder."""
    real = os.path.realpath(entry)  # never fails, unlike Path.resolve on a circle of links
    if entry.is_symlink() and not any(Path(real).is_relative_to(root) for root in roots):
        raise UserError(f"{entry}: a link that leads out of its folder; put the file itself there")
    if entry.exists() and not entry.is_dir():
        regular_file(entry)


def check_header(file: Path) -> None:
    """`UserError` for a safetensors file whose header is longer than any real one, or than the file."""
    size = regular_file(file).stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(HEADER_BYTES, size - 8):
        raise UserError(f"{file}: damaged, or not a safetensors file")


def _check_index(file: Path) -> None:
    """`UserError` unless an index names safetensors files of its own folder."""
    tree = read_json(file, INDEX_BYTES)
    places = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{file}: not an index of weights (`weight_map` is not an object of file names)")
    for place in set(places.values()):
        if inside(file.parent, place).suffix != ".safetensors":
            raise UserError(f"{file}: names {short_repr(place)}, which is not a safetensors file; convert the weights")


def _check_keys(tree: dict[str, Any], file: Path, trusted: bool) -> None:
    for path, key, value in _items(tree):
        mapped = key == "auto_map" and (path or file.name != "config.json")
        if (mapped or key == "trust_remote_code") and value and not trusted:
            raise UserError(
                f"{file}: `{path}{key}` asks for code that travels with it, which is not run; remove the key"
            )
        if _IMPLEMENTATION.fullmatch(key) and value not in _BUILT_IN:
            raise UserError(f"{file}: `{path}{key}` names {short_repr(value)}, code from elsewhere; remove the key")
        if key in _QUANTIZED and value:
            raise UserError(f"{file}: `{path}{key}`: its weights are quantized; give the model in full precision")
        if key == "transformers_weights" and value:
            raise UserError(f"{file}: `{path}{key}` names other weights than the folder's; remove the key")
        if file.name == "tokenizer_config.json" and key.endswith(("_file", "_files")) and key not in _IGNORED_PATHS:
            for name in value if isinstance(value, list) else [value] if value else []:
                inside(file.parent, name)


def _items(tree: Any) -> Iterator[tuple[str, str, Any]]:
    """(dotted path of the object that holds it, key, value) of every entry at any depth."""
    waiting = [("", tree)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                yield path, key, value
                waiting.append((f"{path}{key}.", value))
        elif isinstance(node, list):
            waiting += [(path, value) for value in node]
