"""Lines on what of an adapter's folder has no effect, or perhaps another one than in its training.

PEFT warns of the first two when it loads such an adapter, and says nothing of the third.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relora.lowrank.patterns import compile_end_pattern
from relora.messages import short_name, short_repr

_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "peft_version", "inference_mode", "modules_to_save", "init_lora_weights", "layers_pattern"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config"),
        *("megatron_core", "qalora_group_size", "peft_type", "revision"),
        *("enable_lora", "merge_weights"),  # of PEFT before 0.4
    }
)
"""Keys of adapter_config.json that do not change what the factors mean, or that are read elsewhere."""
_CLASSIFIER_NAMES = ("classifier", "score")
"""Names that PEFT adds to `modules_to_save` of a classifier, which has one of them."""


def config_notes(
    settings: Mapping[str, Any], known: Iterable[str], layers: Iterable[str], others: Sequence[str], rows: Sequence[str]
) -> tuple[str, ...]:
    """Return lines on an adapter's configuration.

    Args:
        settings: the content of adapter_config.json.
        known: keys that are used.
        layers: paths of the layers with factors.
        others: keys of the tensors that were trained in full.
        rows: keys of the embeddings of which rows were trained.
    """
    passed_over = [key for key in settings if settings[key] and key not in {*known, *_WITHOUT_EFFECT}]
    notes = []
    if passed_over:
        notes.append(f"keys that are not known here have no effect: {', '.join(map(short_repr, sorted(passed_over)))}")
    named = settings.get("modules_to_save")
    absent = [
        name
        for name in (named if isinstance(named, list) else [])
        if isinstance(name, str)
        and name not in _CLASSIFIER_NAMES
        and not any(f".{name}." in f".{key}" for key in (*others, *rows))
    ]
    if absent:
        names = ", ".join(map(short_name, absent))
        notes.append(f"`modules_to_save` names {names}, of which its file has no tensor; the base's are used")
    if settings.get("trainable_token_indices") and not rows:
        notes.append("`trainable_token_indices` names tokens, of which its file has no rows; the base's are used")
    return (*notes, *_ambiguous(settings.get("alpha_pattern") or {}, layers))


def _ambiguous(patterns: Mapping[str, float], layers: Iterable[str]) -> list[str]:
    """Find a layer for which several patterns have different values.

    PEFT takes the first one in the order of the file, and sorts the keys when it saves, so the order of the training is
    lost.
    """
    compiled = {key: compile_end_pattern(key, "alpha_pattern") for key in patterns}
    for path in layers:
        found = [key for key, pattern in compiled.items() if pattern.match(path)]
        if len({patterns[key] for key in found}) > 1:
            keys = " and ".join(map(short_repr, found))
            return [
                f"`alpha_pattern` has several values for {short_name(path, 160)} ({keys}): the first in the file "
                "counts, as in PEFT, which sorts them when it saves; the training may have taken another"
            ]
    return []
