"""Weights in the files of a model that the opened class has no place for: another head, a vision tower, further layers.

transformers passes them by: some it reports as unexpected, others it keeps silent about, because the class names them
(`_keys_to_ignore_on_load_unexpected`: heads for multi-token prediction, say). They are neither used nor saved again.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from relora.files.untrusted import INDEX_BYTES, inside, read_json
from relora.messages import LONGEST_PATH, short_name

CONSTANTS = ("bias", "masked_bias", "inv_freq", "original_inv_freq", "position_ids")
"""Last parts of the names that classes ignore because they compute these tensors: masks and frequencies, no weights.
(GPT-2's mask is called `attn.bias`, and the pattern for it also fits biases that are read.)"""


def unread_note(model: PreTrainedModel, unexpected: Iterable[str], folder: Path) -> str | None:
    """Return a line about the weights that were not read into a model; None if there are none.

    Args:
        model: as it was opened.
        unexpected: names of weights that transformers reports as unexpected, as the class would call them.
        folder: holds the files.
    """
    reported, patterns = set(unexpected), [*(model._keys_to_ignore_on_load_unexpected or ())]
    if not reported and not patterns:
        return None
    sizes = dict(_stored_sizes(folder))
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns) or "(?!)")
    known = _names(model)
    passed_by = {
        name
        for name in sizes
        if name not in known and ignored.search(name) and name.rpartition(".")[2] not in CONSTANTS
    }
    unread = sorted(reported | passed_by)
    if not unread:
        return None
    found = [sizes[name] for name in unread if name in sizes]  # experts have other names in the files
    at_least = "at least " if len(found) < len(unread) else ""
    percent = 100 * sum(found) / max(1, sum(sizes.values()))
    return (
        f"not used, and not saved with the model, since {type(model).__name__} has no place for them: {len(unread):,} "
        f"tensors of its files ({at_least}{percent:.2g}% of their numbers), {short_name(unread[0], LONGEST_PATH)} first"
    )


def _names(model: PreTrainedModel) -> set[str]:
    """Return the names of a model's tensors, with and without the prefix of its body; files may have either."""
    names, prefix = set(model.state_dict()), f"{model.base_model_prefix}."
    return names | {f"{prefix}{name}" for name in names} | {name.removeprefix(prefix) for name in names}


def _stored_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name and number of elements of each tensor in the files that transformers reads."""
    names: Mapping[str, str] | list[str] = ["model.safetensors"]
    if not (folder / "model.safetensors").is_file():
        names = read_json(folder / "model.safetensors.index.json", INDEX_BYTES)["weight_map"]
    for name in sorted(set(names.values() if isinstance(names, Mapping) else names)):
        with safe_open(inside(folder, name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                yield key, prod(file.get_slice(key).get_shape())
