"""Another shape for a configuration: the keys that a user gives, and the values that follow from them.

    num_hidden_layers   lists with one entry for each layer, lists of numbers of layers, and how many of the layers use
                        the keys and values of others
    hidden_size, heads  the size of a head, the number of key-value heads

A list that the configuration's class makes by itself, such as `layer_types`, is made anew for the new number of layers.
Any other list is cut, or its pattern is repeated.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from relora.errors import UserError
from relora.messages import first_line

Overrides = Mapping[str, int | bool]
"""Keys of a transformers configuration that replace those of a preset or a model folder."""

POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""Keys of the length of the longest sequence: the common one, then those of MPT and Whisper, which have it not."""

_DEPTH = "num_hidden_layers"
_SHARED = "num_kv_shared_layers"
_NUMBERS_OF_LAYERS = ("_layers", "layer_ids", "indices", "_idxs", "layer_numbers")
"""Endings of the keys of lists that hold numbers of layers."""
_OF_LAYERS = ("layer", "block", "pattern", "types", "schedule")
"""Words in the keys of lists that have an entry for each layer, where the class's default has no such list."""


def with_overrides(config: PreTrainedConfig, overrides: Overrides) -> PreTrainedConfig:
    """Return a copy of the configuration with other values for some keys, and the values that follow from them.

    Raises:
        UserError: the configuration has no such key, or the shape is impossible.
    """
    if not overrides:
        return config
    # the architecture's own names of keys -> the common ones; GPT-2 calls hidden_size n_embd
    own_names = {**_own_positions(config), **config.attribute_map}
    common_names = {own_name: common_name for common_name, own_name in own_names.items()}
    old = {common_names.get(key, key): value for key, value in config.to_dict().items()}
    for key in overrides:
        _check_key(config, key, old)
    new = {**old, **overrides}
    if new.get(_DEPTH) != old.get(_DEPTH):
        _adjust_lists(config, old, new)
    if "num_attention_heads" in old:
        _adjust_heads(old, new, overrides)
    try:
        # under its own names, from which a class may compute others
        made = type(config)(**{own_names.get(key, key): value for key, value in new.items()})
    except Exception as error:  # the library has no class of its own for impossible shapes
        raise UserError(f"model: this shape cannot be: {informative_line(error)}") from None
    if new.get(_DEPTH) != old.get(_DEPTH) and old.get(_SHARED):
        made.num_kv_shared_layers = _shared_layers(old, made)
    return made


def _own_positions(config: PreTrainedConfig) -> dict[str, str]:
    """Return the common key of the number of positions -> the architecture's own, if transformers does not know it."""
    common, *others = POSITIONS
    own = next((key for key in others if hasattr(config, key)), None)
    return {} if own is None or hasattr(config, common) else {common: own}


def informative_line(error: BaseException) -> str:
    """Return the informative line of a library's message: the second one if the first only names the validator."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return first_line(lines[1] if isinstance(error, StrictDataclassError) and len(lines) > 1 else lines[0])


def _check_key(config: PreTrainedConfig, key: str, old: Mapping[str, Any]) -> None:
    """Raise `UserError` for a key that the configuration does not have, or that is not the decoder's.

    In an encoder-decoder configuration the common names stand for the encoder, which a causal LM does not have.
    """
    if key not in old:
        raise UserError(f"model.{key}: a {config.model_type} model has no such key")
    if config.attribute_map.get(key, "").startswith("encoder_") or (key == _DEPTH and "decoder_layers" in old):
        raise UserError(
            f"model.{key}: is of the encoder in a {config.model_type} model; change the decoder's in its config.json"
        )


def _adjust_lists(config: PreTrainedConfig, old: Mapping[str, Any], new: dict[str, Any]) -> None:
    """Adjust what in `new` depends on the number of layers to its `num_hidden_layers`.

    Args:
        config: the configuration before.
        old: its keys.
        new: keys after the overrides; changed in place.

    Raises:
        UserError: no list for this number of layers follows from the old one.
    """
    before, after = old[_DEPTH], new[_DEPTH]
    for key, value in old.items():
        if isinstance(value, list | tuple) and _has_entry_per_layer(config, key, value):
            if key == "attention_layers" and old.get("attention_types"):  # GPT-Neo makes the first from the second
                (kinds, _), *others = old["attention_types"]
                new["attention_types"] = [[_fitted(key, list(value if others else kinds * 2), after), 1]]
            if _is_derived(config, key, old):
                del new[key]
            else:
                new[key] = _fitted(key, list(value), after)
        elif _holds_numbers(key, value, before):
            new[key] = [number for number in value if number < after]
            if _is_derived(config, key, old):
                del new[key]
        elif key == "per_layer_config" and value:  # number of a layer -> its own keys
            new[key] = {number: keys for number, keys in value.items() if int(number) < after}
            if _is_derived(config, key, old):
                del new[key]


def _shared_layers(old: Mapping[str, Any], made: PreTrainedConfig) -> int:
    """Return how many of the last layers use the keys and values of earlier ones: the share of all layers as before.

    They are fewer where the earlier layers would not be of all kinds.
    """
    depth, kinds = made.num_hidden_layers, list(getattr(made, "layer_types", None) or [])
    shared = round(depth * old[_SHARED] / old[_DEPTH])
    while shared and set(kinds[: depth - shared]) != set(kinds):
        shared -= 1
    return int(shared)


def _has_entry_per_layer(config: PreTrainedConfig, key: str, value: list[Any] | tuple[Any, ...]) -> bool:
    """Tell whether a list has an entry for each layer, as that of the class's default configuration has.

    The length alone does not show it: a model of two layers may have two ids of EOS.
    """
    if not value or len(value) != getattr(config, _DEPTH, None):
        return False
    default = type(config)()
    like = getattr(default, key, None)
    if isinstance(like, list | tuple):
        return len(like) == getattr(default, _DEPTH, None)
    return any(word in key for word in _OF_LAYERS)


def _holds_numbers(key: str, value: object, layers: int) -> bool:
    """Tell whether a value is a list of numbers of layers, counted from zero."""
    return (
        isinstance(value, list | tuple)
        and key.endswith(_NUMBERS_OF_LAYERS)
        and len(value) > 0
        and all(type(number) is int and 0 <= number < layers for number in value)
    )


def _is_derived(config: PreTrainedConfig, key: str, old: Mapping[str, Any]) -> bool:
    """Tell whether the configuration's class makes the value of a key from its other keys."""
    try:
        made = type(config)(**{name: value for name, value in old.items() if name != key})
    except Exception:  # of any type: the class cannot do without the key
        return False
    return bool(_listed(made.to_dict().get(key)) == _listed(old[key]))


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _fitted(key: str, entries: list[Any], layers: int) -> list[Any]:
    """Cut a list to `layers` entries, or repeat the shortest pattern of which it consists, at least twice."""
    if layers <= len(entries):
        return entries[:layers]
    for period in range(1, len(entries) // 2 + 1):
        if all(entry == entries[place % period] for place, entry in enumerate(entries)):
            return [entries[place % period] for place in range(layers)]
    raise UserError(
        f"model.{_DEPTH}: `{key}` of the configuration has an entry for each of its {len(entries)} layers, without a "
        f"pattern that could be repeated for {layers}; give both in a config.json"
    )


def _adjust_heads(old: dict[str, Any], new: dict[str, Any], overrides: Overrides) -> None:
    """Adjust the number of key-value heads and the size of a head in `new` to its hidden size and number of heads.

    If the old configuration has as many key-value heads as heads, or heads that divide its hidden size, so has the new
    one.

    Args:
        old: keys of the configuration before the overrides.
        new: keys after the overrides; changed in place.

    Raises:
        UserError: a number of the new shape is not a multiple of another, as it must be.
    """
    hidden, heads = new["hidden_size"], new["num_attention_heads"]
    if old.get("num_key_value_heads") == old["num_attention_heads"] and "num_key_value_heads" not in overrides:
        new["num_key_value_heads"] = heads
    groups = new.get("num_key_value_heads") or heads
    if heads % groups:
        raise UserError(
            f"model.num_attention_heads ({heads}) is not a multiple of model.num_key_value_heads ({groups})"
        )
    if old.get("head_dim") not in (None, old["hidden_size"] // old["num_attention_heads"]):
        return  # the architecture has heads of a size that does not depend on the hidden size
    if hidden % heads:
        raise UserError(f"model.hidden_size ({hidden}) is not a multiple of model.num_attention_heads ({heads})")
    if "rope_parameters" in old and hidden // heads % 2:
        raise UserError(
            f"model.hidden_size ({hidden}) over model.num_attention_heads ({heads}) must be even: "
            "rotary position embeddings turn pairs of numbers"
        )
    if "head_dim" in old:
        new["head_dim"] = hidden // heads
