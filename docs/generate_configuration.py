"""Write the generated parts of docs/configuration.md: its tables of keys and its two complete YAML files.

    python docs/generate_configuration.py

Such a part stands between the lines `<!-- generated: WHAT -->` and `<!-- end -->`. Everything in it comes from the
classes of `relora.config`: names, types and bounds from their JSON schema, the meaning from the first sentence of the
string under each field, and each default from a configuration that gives nothing but what is required.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from relora.config import FinetuneConfig, RunConfig

DOCUMENT = Path(__file__).with_name("configuration.md")
REQUIRED: dict[type[RunConfig | FinetuneConfig], dict[str, Any]] = {
    RunConfig: {
        "output_dir": "runs/x",
        "model": {"preset": "llama-9m"},
        "data": {"train": "x/train", "validation": "x/validation"},
        "schedule": {"total_steps": 10_000},
    },
    FinetuneConfig: {
        "output_dir": "runs/x",
        "task": "instruct",
        "model": {"path": "x/model"},
        "data": {"train": "x.jsonl"},
    },
}
"""Least that a configuration of each kind has to give. The documents leave these values open."""
COMMENT_COLUMN = 34
LINE_WIDTH = 120
LARGEST_SHOWN_BOUND = 1000
"""Larger bounds only keep absurd numbers out."""


@dataclass(frozen=True)
class Key:
    """One key of a configuration; the fields are text, ready to be printed."""

    path: str
    """Dotted, e.g. `lowrank.residual.scale`."""
    type: str
    default: str
    """As YAML; empty for a required key."""
    required: bool
    meaning: str
    """One sentence."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """One section of a configuration."""

    path: str
    meaning: str
    members: "tuple[Key | Section, ...]"


def read_section(kind: type[RunConfig | FinetuneConfig]) -> Section:
    """Read all keys and sections of one kind of configuration, on every level plain keys first."""
    schema = kind.model_json_schema()
    defaults = kind.model_validate(REQUIRED[kind]).model_dump(mode="json")
    return _section("", schema, schema["$defs"], defaults, REQUIRED[kind])


def _section(
    path: str, schema: dict[str, Any], classes: dict[str, Any], defaults: dict[str, Any], open_values: dict[str, Any]
) -> Section:
    members: list[Key | Section] = []
    for name, field in schema["properties"].items():
        inner = f"{path}.{name}".removeprefix(".")
        class_name = _class_name(field)
        if class_name is not None:
            members.append(_section(inner, classes[class_name], classes, defaults[name], open_values.get(name, {})))
            continue
        choices = tuple(str(choice) for choice in field.get("enum", ()))
        required = name in schema.get("required", ())
        default = "" if required else _as_yaml(None if name in open_values else defaults[name])
        meaning = first_sentence(field["description"])
        members.append(Key(inner, describe_type(field, classes), default, required, meaning, choices))
    members.sort(key=lambda member: isinstance(member, Section))
    return Section(path, first_sentence(schema["description"]), tuple(members))


def _class_name(field: dict[str, Any]) -> str | None:
    """Return the class of a field that is a section (or a section or one word, as `warm_start` is), else None."""
    references = [option["$ref"] for option in (field, *field.get("anyOf", ())) if "$ref" in option]
    return references[0].rpartition("/")[2] if references else None


def first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", " ".join(text.split()))[0]


def _as_yaml(value: object) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=1000).strip()[1:-1]


def describe_type(field: dict[str, Any], classes: dict[str, Any]) -> str:
    """Describe the values that a JSON schema admits, e.g. `0 ≤ number < 1`."""
    if "anyOf" in field:
        options = [option for option in field["anyOf"] if option.get("type") != "null"]
        return " or ".join(describe_type(option, classes) for option in options)
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if "$ref" in field:
        return "`{" + ", ".join(classes[field["$ref"].rpartition("/")[2]]["properties"]) + "}`"
    if "prefixItems" in field:
        return "[" + ", ".join(describe_type(item, classes) for item in field["prefixItems"]) + "]"
    if field["type"] == "array":
        return f"list of {describe_type(field['items'], classes)}"
    if field["type"] == "object":
        return f"mapping of text to {describe_type(field['additionalProperties'], classes)}"
    if field["type"] == "string":
        return "path" if "minLength" in field else "text"
    low = _bound(field, {"gt": ">", "exclusiveMinimum": ">", "ge": "≥", "minimum": "≥"})
    high = _bound(field, {"lt": "<", "exclusiveMaximum": "<", "le": "≤", "maximum": "≤"})
    if low and high:
        return f"{low[2:]} {low[0].translate(str.maketrans('>≥', '<≤'))} {field['type']} {high}"
    return f"{field['type']} {low or high}".strip()


def _bound(field: dict[str, Any], signs: dict[str, str]) -> str:
    """Return the bound that has one of the names in `signs`, as `> 0`, or an empty text."""
    for name, sign in signs.items():
        if name in field and field[name] <= LARGEST_SHOWN_BOUND:
            return f"{sign} {field[name]:g}"
    return ""


def keys_of(section: Section) -> Iterator[Key]:
    """Yield all keys of a section and of the sections in it."""
    for member in section.members:
        if isinstance(member, Key):
            yield member
        else:
            yield from keys_of(member)


def table_row(key: Key) -> str:
    """Write a key as a row of a table in Markdown."""
    default = "required" if key.required else f"`{key.default}`"
    return f"| `{key.path}` | {key.type} | {default} | {key.meaning} |"


def table(rows: list[str]) -> str:
    return "\n".join(["| key | type | default | meaning |", "|-----|------|---------|---------|", *rows])


def complete_yaml(root: Section) -> str:
    """Write a YAML file that has every key, each at its default and with a comment; what is required stays empty."""
    return "\n".join(["```yaml", *_yaml_lines(root, ""), "```"])


def _yaml_lines(section: Section, indent: str) -> Iterator[str]:
    for member in section.members:
        name = member.path.rpartition(".")[2]
        if isinstance(member, Key):
            choices = f" One of {', '.join(member.choices)}." if member.choices else ""
            comment = ("Required. " if member.required else "") + member.meaning + choices
            yield from _commented(f"{indent}{name}: {member.default}".rstrip(), comment)
        else:
            yield from ("",) if not indent else ()
            yield from _commented(f"{indent}{name}:", member.meaning)
            yield from _yaml_lines(member, indent + "  ")


def _commented(line: str, comment: str) -> Iterator[str]:
    lines = textwrap.wrap(comment.replace("`", ""), LINE_WIDTH - COMMENT_COLUMN - 2, break_on_hyphens=False)
    for first, text in zip([line, *[""] * len(lines)], lines, strict=False):
        yield f"{first:<{COMMENT_COLUMN}}# {text}"


def generated_part(what: str) -> str:
    """Write one part of the document.

    Args:
        what: `pretraining YAML` or `fine-tuning YAML`, a complete file; `keys SECTION ...`, a table of these sections'
            keys of pretraining (`top` for the keys that are in none); `keys of fine-tuning`, a table of the keys that
            pretraining does not have, or has with another type, default or meaning.
    """
    pretraining, finetuning = read_section(RunConfig), read_section(FinetuneConfig)
    if what == "pretraining YAML":
        return complete_yaml(pretraining)
    if what == "fine-tuning YAML":
        return complete_yaml(finetuning)
    if what == "keys of fine-tuning":
        shared = {table_row(key) for key in keys_of(pretraining)}
        return table([row for row in map(table_row, keys_of(finetuning)) if row not in shared])
    word, *sections = what.split()
    assert word == "keys", f"{DOCUMENT}: nothing is known of `generated: {what}`"
    return table([table_row(key) for key in keys_of(pretraining) if (key.path.rpartition(".")[0] or "top") in sections])


def generate(document: str) -> str:
    """Return the document with all its generated parts written anew."""
    parts = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return parts.sub(lambda part: f"{part[1]}\n{generated_part(part[2])}\n\n{part[3]}", document)


if __name__ == "__main__":
    DOCUMENT.write_text(generate(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
