"""Checks of files and folders that somebody else may have made, before any library reads them.

Refused, each with a `UserError` of one line:

- a name in an index, or a symbolic link, that leads out of the folder (links of a hub snapshot into the `blobs` folder
  of the same repository are allowed)
- a pipe or a device in place of a file, from which a reader would wait for ever
- a file, a safetensors header or a nesting that is larger than in any genuine model or configuration
- keys with which a configuration names code to import or a kernel to download
- in YAML: tags other than its own, aliases that multiply ("bombs"), and a key that occurs twice in one section
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
"""Largest YAML configuration. One with every key has 3 KB; the parser takes up to 0.7 s for a file of this size."""
DEPTH = 20
"""Largest number of nested levels in a YAML configuration."""
CONFIG_BYTES = {
    "config.json": MB // 4,
    "generation_config.json": MB // 4,
    "tokenizer_config.json": 4 * MB,  # the largest list every added token, in about 1 MB
}
"""Largest size of each configuration in a model folder; transformers takes seconds for a megabyte of small entries."""
INDEX_BYTES = 10 * MB
"""Largest index of weights; that of a model with 671 billion parameters has 9 MB."""
TOKENIZER_BYTES = 48 * MB
"""Largest vocabulary file; those of 260,000 ids have about 35 MB."""
HEADER_BYTES = 4 * MB
"""Largest header of a safetensors file; it describes about 30,000 tensors."""

_BUILT_IN = (
    *(None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    *("batched_mm", "grouped_mm"),
)
"""Implementations of attention and experts that are part of transformers; any other is code from the hub."""
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
"""Keys that name an implementation of attention or of experts."""
_QUANTIZED = ("quantization_config", "compression_config")
"""Keys that say that the weights are quantized."""
_IGNORED_PATHS = ("tokenizer_file", "special_tokens_map_file")
"""Keys that say where the tokenizer was once saved; transformers does not open these paths."""


def regular_file(file: Path, most_bytes: int | None = None) -> Path:
    """Return `file` after checking that it, or what it links to, is a regular file of at most `most_bytes` bytes.

    Raises:
        OSError: it does not exist, or its status cannot be read.
        UserError: it is a folder, a pipe or a device, or it is larger.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: cannot be read: not a regular file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise UserError(f"{file}: {status.st_size:,} bytes; such a file has at most {most_bytes:,}")
    return file


def no_address(name: str) -> str:
    """Return a path or a hub id after checking that it is not a web address, that is, that it does not contain `://`.

    Raises:
        ValueError: it is a web address, from which this package never fetches anything. The message does not repeat
            the address, since people write access tokens into addresses.
    """
    if "://" in name:
        raise ValueError("a web address cannot be used; give a folder or a hub id (owner/name)")
    return name


def read_json(file: Path, most_bytes: int = 4 * MB) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a regular file, has more than `most_bytes` bytes, is not valid JSON, or is nested so deeply
            that the parser gives up.
    """
    data = regular_file(file, most_bytes).read_bytes()
    try:
        return json.loads(data)
    except RecursionError:
        raise UserError(f"{file}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None


def inside(folder: Path, name: object) -> Path:
    """Return the path of the file that an index or a manifest in `folder` names.

    Such an index names files of its own folder only, so every name with a path separator is refused, not only `..`.
    The file need not exist.

    Raises:
        UserError: `name` is not a plain name (a text without separators and control characters), or it is the name of a
            pipe, a device, or a link that leads out of `folder`.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
        raise UserError(f"{folder}: names {short_repr(name)}, which is not a file of this folder")
    _check_entry(folder / name, _allowed_roots(folder))
    return folder / name


def check_folder(folder: Path) -> None:
    """Check that everything in a folder, at any depth, is a file, a folder, or a link that stays inside.

    A link of a hub snapshot may also lead into the `blobs` folder of its repository.

    Through a link that leads out, a file of the user's machine could get into a model that the user publishes, or be
    overwritten.

    Raises:
        UserError: there is such a link, a pipe or a device, or `folder` is not a folder. A folder that does not exist
            is accepted.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is not a folder")
    roots = _allowed_roots(folder)
    pending = [folder]
    while pending:
        with contextlib.suppress(FileNotFoundError):  # a run in progress may delete an old checkpoint meanwhile
            for entry in pending.pop().iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    pending.append(entry)
                else:
                    _check_entry(entry, roots)


def check_model_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Check a model folder before it is given to transformers.

    `auto_map` in config.json is allowed: transformers ignores it unless it is told to trust remote code (see
    `remote_code`), and many models that transformers supports itself have one.

    Args:
        trust_remote_code: allow configurations to name code that is in the folder.

    Raises:
        UserError: transformers would open files outside the folder, run code, or read a file that is too large or
            damaged; the folder holds an adapter; or its weights are quantized.
        OSError: the folder does not exist.
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
    """Return the code files that transformers runs with this folder if it is told to trust remote code, sorted.

    They are those that `auto_map` names, and `custom_generate/generate.py`; not the files that these import. Each is
    `name.py` for a file of the folder, or `owner/name--name.py` for a file of another repository of the hub.
    """
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
    """Return the value in a YAML file; see `parse_yaml`.

    Raises:
        OSError: the file cannot be read.
        UserError: it is not a regular file, too large, not UTF-8, or `parse_yaml` refuses it.
    """
    data = regular_file(file, YAML_BYTES).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error.reason} at byte {error.start:,}") from None
    return parse_yaml(text, str(file))


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text: mappings, lists, and the plain values that `yaml.safe_load` knows (dates, too).

    Three things are refused that `yaml.safe_load` accepts: a key that occurs twice in a section (YAML would take the
    last), more than `DEPTH` levels, and an alias of a section or a list, with which a short text can expand without
    limit. An alias of a plain value is allowed.

    Args:
        text: the YAML text.
        source: name of its origin, for messages.

    Raises:
        UserError: the text is not valid YAML, or one of the three.
    """
    try:
        return _PlainLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"{source}{line}: not valid YAML: {str(error.problem)[:120]}") from None
    except (yaml.YAMLError, ValueError, OverflowError, KeyError, AttributeError) as error:  # a tag that does not fit
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())[:120]}") from None


class _PlainLoader(yaml.SafeLoader):
    """The loader of `parse_yaml`, which refuses a node while nodes are composed, before any value is constructed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose the next node; refuse one that is too deep, and an alias of a section or a list."""
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
        """Compose a section; refuse one in which a key occurs twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    self._refuse(f"the key `{key.value}` stands twice in one section", key.start_mark)
                seen.add(key.value)
        return node

    def _refuse(self, problem: str, mark: Any) -> None:
        """Raise the error that `parse_yaml` turns into its message; `mark` is the position in the text."""
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _allowed_roots(folder: Path) -> list[str]:
    """Return the real paths into which links of a folder may lead.

    They are the folder itself and, for a hub snapshot (`REPO/snapshots/COMMIT`), `REPO/blobs`.
    """
    real = Path(os.path.realpath(folder))
    roots = [str(real)]
    if real.parent.name == "snapshots":
        roots.append(str(real.parent.parent / "blobs"))
    return roots


def _check_entry(entry: Path, roots: list[str]) -> None:
    """Raise `UserError` for a link that leads out of `roots`, and for a pipe or a device."""
    real = os.path.realpath(entry)  # does not raise on a cycle of links, as Path.resolve does
    if entry.is_symlink() and not any(Path(real).is_relative_to(root) for root in roots):
        raise UserError(f"{entry}: a link that leads out of its folder; put the file itself there")
    if entry.exists() and not entry.is_dir():
        regular_file(entry)


def check_header(file: Path) -> None:
    """Raise `UserError` for a safetensors file whose header is longer than `HEADER_BYTES` or than the file."""
    size = regular_file(file).stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(HEADER_BYTES, size - 8):
        raise UserError(f"{file}: damaged, or not a safetensors file")


def _check_index(file: Path) -> None:
    """Raise `UserError` unless an index of weights names safetensors files of its own folder only."""
    tree = read_json(file, INDEX_BYTES)
    names = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{file}: not an index of weights (`weight_map` is not an object of file names)")
    for name in set(names.values()):
        if inside(file.parent, name).suffix != ".safetensors":
            raise UserError(f"{file}: names {short_repr(name)}, which is not a safetensors file; convert the weights")


def _check_keys(tree: dict[str, Any], file: Path, trusted: bool) -> None:
    """Raise `UserError` for a key of a configuration that names code, quantized weights or files elsewhere.

    Code: `auto_map` (but at the top of config.json), `trust_remote_code`, and an implementation of attention or experts
    that is not part of transformers. Files: `transformers_weights` and, in tokenizer_config.json, keys that end in
    `_file` or `_files`.

    Args:
        tree: content of the configuration.
        file: its path; the rules for config.json and tokenizer_config.json differ.
        trusted: the user trusts code that is in the folder, so `auto_map` and `trust_remote_code` are allowed.
    """
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
        names_files = key.endswith(("_file", "_files")) and key not in _IGNORED_PATHS
        if file.name == "tokenizer_config.json" and names_files and value:
            for name in value if isinstance(value, list) else [value]:
                inside(file.parent, name)


def _items(tree: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield every entry of the objects in a JSON value, at any depth.

    Each is given as the dotted path of the object that holds it (empty, or with a dot at its end), key and value. Lists
    are searched, too, and add nothing to the path.
    """
    pending = [("", tree)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, dict):
            for key, value in node.items():
                yield path, key, value
                pending.append((f"{path}{key}.", value))
        elif isinstance(node, list):
            pending += [(path, value) for value in node]
