"""What of an adapter's folder has no effect, or perhaps another one than in its training, is said once, and by name."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file
from tests.adapters.test_peft_kinds import CASES, KINDS, Q, built, opened, saved
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from relora.adapters.base_model import is_same_base
from relora.adapters.combine import combine_adapters
from relora.adapters.compatibility import warn_of_notes
from relora.adapters.merge import merge_adapter
from relora.adapters.multi_adapter import Adapters
from relora.adapters.peft_format import CONFIG, TENSORS, read_adapter, read_config
from relora.adapters.save_load import load_adapter
from relora.adapters.show import show_adapter
from relora.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),  # PEFT warns of tied weights
]

USES: dict[str, Callable[[Path, Path, Path], Any]] = {
    "merge": lambda adapter, base, out: merge_adapter(adapter, out, base=base),
    "beside": lambda adapter, base, out: Adapters(opened(base)).load("one", adapter),
    "train": lambda adapter, base, out: load_adapter(opened(base), adapter),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    built("untied").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def named(adapter: Path, **settings: Any) -> Path:
    file = adapter / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return adapter


def without(adapter: Path, part: str) -> Path:
    """Take the tensors out whose keys have a part in common."""
    kept = {key: tensor for key, tensor in load_file(adapter / TENSORS).items() if part not in key}
    save_file(kept, adapter / TENSORS, metadata={"format": "pt"})
    return adapter


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("settings", "taken_out", "line"),
    [
        ({"later_method": {"k": 2}, "off": False}, None, "keys that are not known here have no effect: 'later_method'"),
        ({"modules_to_save": ["norm", "classifier"]}, None, "`modules_to_save` names norm, of which its file has no"),
        ({"trainable_token_indices": [3, 4]}, None, "`trainable_token_indices` names tokens, of which its file has no"),
        ({"target_modules": ["q_proj", "v_proj"]}, None, "names 2 layers (model.layers.0.self_attn.v_proj, ...), of"),
        ({}, "layers.1.", "`target_modules` names model.layers.1.self_attn.q_proj, of which its file has no factors"),
        (
            {"alpha_pattern": {"q_proj": 1, r"layers\.1\.self_attn\.q_proj": 9}},
            None,
            "`alpha_pattern` has several values for model.layers.1.self_attn.q_proj",
        ),
    ],
)
def test_what_has_no_effect_is_said(
    use: str,
    settings: dict[str, Any],
    taken_out: str | None,
    line: str,
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved(base, tmp_path / "adapter", **Q)
    adapter = named(tmp_path / "adapter", **settings)
    if taken_out:
        without(adapter, taken_out)
    USES[use](adapter, base, tmp_path / "out")
    assert [record.getMessage() for record in caplog.records if line in record.getMessage()] == caplog.messages
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"warning: {adapter}: ")


@pytest.mark.parametrize(("name", "family"), CASES)
def test_what_peft_saves_is_used_whole(
    name: str, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built(family).save_pretrained(tmp_path / "base")
    saved(tmp_path / "base", tmp_path / "adapter", **KINDS[name].settings)
    with caplog.at_level(logging.WARNING, "relora"):
        warn_of_notes(tmp_path / "adapter", read_adapter(tmp_path / "adapter"), opened(tmp_path / "base"))
    assert not [one for one in caplog.records if one.name.startswith("relora")]


def test_every_key_of_pefts_configuration_is_known(base: Path, tmp_path: Path) -> None:
    """A key that a later PEFT adds is said, so one that changes the function cannot pass unseen."""
    saved(base, tmp_path / "adapter", **Q)
    settings = read_config(tmp_path / "adapter")
    refused = {key for key in settings if key not in ("r", "peft_type", "task_type")}
    for key in sorted(refused):
        changed = named(Path(shutil.copytree(tmp_path / "adapter", tmp_path / key)), **{key: settings[key] or 1})
        try:
            assert not [note for note in read_adapter(changed).notes if "not known" in note], key
        except UserError as error:
            assert f"`{key}`" in str(error) or key in str(error)


def test_another_base_is_said_when_it_is_merged_into(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(base, tmp_path / "adapter", **Q)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    merge_adapter(tmp_path / "adapter", tmp_path / "one", base=base, check=False)
    assert not caplog.messages
    merge_adapter(tmp_path / "adapter", tmp_path / "two", base=other, check=False)
    assert caplog.messages == [f"warning: {tmp_path / 'adapter'} was trained on {base}, not on {other}"]


def test_adapters_of_two_bases_are_combined_with_a_word(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two"):
        saved(base, tmp_path / name, **Q)
    folders = [tmp_path / "one", tmp_path / "two"]
    assert combine_adapters(folders, tmp_path / "sum").base == str(base) and not caplog.messages
    named(tmp_path / "two", base_model_name_or_path="owner/another")
    assert combine_adapters(folders, tmp_path / "sum of two").base is None
    (message,) = caplog.messages
    assert f"{tmp_path / 'two'} names the base owner/another, {tmp_path / 'one'} {base}" in message


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("owner/model", "owner/model", True),
        ("owner/model", "stranger/model", False),
        ("/gone/model", "owner/model", True),
        ("/gone/model", "/elsewhere/other", False),
    ],
)
def test_names_of_one_base(one: str, other: str, same: bool) -> None:
    assert is_same_base(one, other) is is_same_base(other, one) is same


def test_an_adapter_of_a_classifier_is_no_language_models(base: Path, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS", **Q)
    peft.get_peft_model(classifier, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"made for a classifier \(task_type SEQ_CLS\).*no score\.weight"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", base=base)


def weakened(adapter: Path, share: float) -> Path:
    tensors: dict[str, Tensor] = load_file(adapter / TENSORS)
    changed = {key: tensor * share if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(changed, adapter / TENSORS, metadata={"format": "pt"})
    return adapter


def test_an_update_that_the_stored_dtype_rounds_away_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built("untied").bfloat16().save_pretrained(tmp_path / "base")
    saved(tmp_path / "base", tmp_path / "adapter", **Q)
    merge_adapter(tmp_path / "adapter", tmp_path / "strong", base=tmp_path / "base")
    assert not caplog.messages
    merge_adapter(weakened(tmp_path / "adapter", 1e-3), tmp_path / "weak", base=tmp_path / "base")
    (message,) = caplog.messages
    assert "merge into the base in fp32" in message and "rounds away" in message


def test_they_are_said_where_an_adapter_is_shown(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(base, tmp_path / "adapter", **Q)
    show_adapter(named(tmp_path / "adapter", later_method=True))
    assert len(caplog.messages) == 1 and "'later_method'" in caplog.messages[0]
