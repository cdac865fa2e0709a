"""Merging into model folders writes W + s·B A, cast once, copies everything else, and can be undone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.test_save_load import moved
from tests.lowrank.test_inject import FAMILIES, IDS
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from relora.adapters.merge import RECORD, merge_adapter, unmerge_adapter
from relora.adapters.peft_format import CONFIG, TENSORS, read_adapter
from relora.adapters.save_load import save_adapter
from relora.errors import NonFinite, UserError
from relora.lowrank import LowRankConfig, inject
from relora.model.load import open_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it


def built(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = FAMILIES[family][0]().eval()
    return model


def base_folder(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model in several weight files, with a tokenizer file beside them."""
    built(family).to(dtype).save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not to be copied")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def adapter_folder(family: str, folder: Path, base: Path | None = None, **settings: Any) -> Path:
    model = built(family)
    inject(model, LowRankConfig(**{"r": 4, "lora_alpha": 8, "rest": "frozen", **settings}))
    moved(model)
    return save_adapter(model, folder, base=None if base is None else str(base))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return base_folder("llama", tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return adapter_folder("llama", tmp_path / "adapter", base)


def test_merged_into_the_weights_that_transformers_opens(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Where one file stands beside the shards of an index, it is the model; nothing of the index is left."""
    other = built("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path / "one")
    shutil.copyfile(tmp_path / "one" / "model.safetensors", base / "model.safetensors")
    assert len(list(base.glob("*.safetensors"))) > 2
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    report = merge_adapter(adapter, tmp_path / "merged", base=base)
    assert report.largest_logit_difference is not None and report.largest_logit_difference < 1e-4
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "merged"), expected(IDS).logits, rtol=1e-5, atol=1e-5)
    assert [file.name for file in (tmp_path / "merged").glob("model*")] == ["model.safetensors"]
    assert unmerge_adapter(tmp_path / "merged", tmp_path / "again").exact
    assert torch.equal(logits(tmp_path / "again"), logits(base))


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"trained_modules": ("norm", "ln_f", "final_layer_norm")}])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_what_peft_makes_of_it(family: str, kind: dict[str, Any], tmp_path: Path) -> None:
    base = base_folder(family, tmp_path / "base")
    if "trained_modules" in kind:
        kind = {"trained_modules": {"gpt2": ("ln_f",), "neox": ("final_layer_norm",)}.get(family, ("norm",))}
    adapter = adapter_folder(family, tmp_path / "adapter", base, **kind)
    report = merge_adapter(adapter, tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(built(family), adapter)
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(base), expected, atol=1e-3)
    assert report.largest_logit_difference is not None and report.largest_logit_difference < 1e-4
    assert report.tokens == 32 and report.layers == len(read_adapter(adapter).layers)
    copied = {file.name for file in base.iterdir()} - {"pytorch_model.bin"}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == copied | {RECORD}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_added_to_in_fp32_and_cast_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_folder("gpt2", tmp_path / "base", dtype)
    adapter = adapter_folder("gpt2", tmp_path / "adapter", base)
    report = merge_adapter(adapter, tmp_path / "merged", check=False)
    assert report.largest_logit_difference is None and report.tokens == 0
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {f"{path}.weight": factors for path, factors in read_adapter(adapter).layers.items()}
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        if name in changed:
            precise = torch.promote_types(dtype, torch.float32)
            delta = changed[name].scaling * changed[name].lora_B.to(precise) @ changed[name].lora_A.to(precise)
            torch.testing.assert_close(tensor, (before[name].to(precise) + delta.T).to(dtype), rtol=0, atol=0)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])


def test_files_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    """GPT-2's files on the hub have keys that do not begin with `transformer.`."""
    base = base_folder("gpt2", tmp_path / "base")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors(base).items()}
    for file in base.glob("*.safetensors*"):
        file.unlink()
    save_file(stripped, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_folder("gpt2", tmp_path / "adapter", base)
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.largest_logit_difference is not None and report.largest_logit_difference < 1e-4


def test_tied_embeddings_trained_in_full(tmp_path: Path) -> None:
    base = base_folder("tied_qwen", tmp_path / "base")
    adapter = adapter_folder("tied_qwen", tmp_path / "adapter", base, trained_modules=("embed_tokens",))
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.full_tensors == 2
    assert report.largest_logit_difference is not None and report.largest_logit_difference < 1e-4
    assert "lm_head.weight" not in tensors(tmp_path / "merged")


def refused(place: Path, attempt: Callable[[Path], object], *words: str) -> None:
    """The message is one line, and no file has been created."""
    before = {path: path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")}
    with pytest.raises(UserError) as caught:
        attempt(place / "refused")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")} == before


def test_refused_merges(base: Path, adapter: Path, tmp_path: Path) -> None:
    def of(given: Path, on: Path | None = None) -> Callable[[Path], object]:
        return lambda out: merge_adapter(given, out, base=on)

    merge_adapter(adapter, tmp_path / "merged")
    again = "is merged into it already; merge into"
    refused(tmp_path, of(adapter, tmp_path / "merged"), str(tmp_path / "merged"), str(adapter), again, str(base))
    refused(tmp_path, lambda _: merge_adapter(adapter, tmp_path / "merged"), "is there already and was left as it is")
    refused(tmp_path, of(tmp_path / "gone"), "no such folder")
    refused(tmp_path, of(base), "not an adapter")
    refused(tmp_path, of(adapter, adapter), "not a model folder")
    nameless = adapter_folder("llama", tmp_path / "nameless")
    refused(tmp_path, of(nameless), "does not name its base model; give it by --base")
    other = base_folder("neox", tmp_path / "neox")
    refused(tmp_path, of(adapter, other), "made for another base model", "no linear layer model.layers.0")
    config = json.loads((nameless / CONFIG).read_text())
    (nameless / CONFIG).write_text(json.dumps(config | {"peft_type": "VERA"}))
    refused(tmp_path, of(nameless, base), "peft_type 'VERA'")
    (adapter / TENSORS).write_bytes((adapter / TENSORS).read_bytes()[:-4])
    refused(tmp_path, of(adapter), "damaged")


def test_what_would_not_be_finite_is_not_written(tmp_path: Path) -> None:
    base = base_folder("llama", tmp_path / "base", torch.float16)
    model = built("llama")
    inject(model, LowRankConfig(r=4, lora_alpha=1e7, rest="frozen"))
    moved(model)
    adapter = save_adapter(model, tmp_path / "adapter")
    with pytest.raises(NonFinite, match="would not be finite in float16"):
        merge_adapter(adapter, tmp_path / "merged", base=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"trained_modules": ("lm_head",)}])
def test_with_the_base_at_hand_it_comes_back_bit_for_bit(kind: dict[str, Any], tmp_path: Path) -> None:
    base = base_folder("llama", tmp_path / "base", torch.bfloat16)
    adapter = adapter_folder("llama", tmp_path / "adapter", base, **kind)
    merge_adapter(adapter, tmp_path / "merged", check=False)
    report = unmerge_adapter(tmp_path / "merged", tmp_path / "again")
    assert report.exact and report.error_bound == 0
    assert files(tmp_path / "again") == {n: c for n, c in files(base).items() if n != "pytorch_model.bin"}
    base.rename(tmp_path / "elsewhere")
    shutil.rmtree(adapter)
    report = unmerge_adapter(tmp_path / "merged", tmp_path / "moved", base=tmp_path / "elsewhere")
    assert report.exact and files(tmp_path / "moved") == files(tmp_path / "again")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_base_it_comes_back_within_the_stated_bound(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = base_folder(family, tmp_path / "base", dtype)
    adapter = adapter_folder(family, tmp_path / "adapter", base)
    merge_adapter(adapter, tmp_path / "merged", check=False)
    original = tensors(base)
    shutil.rmtree(base)
    report = unmerge_adapter(tmp_path / "merged", tmp_path / "again")
    found = tensors(tmp_path / "again")
    assert found.keys() == original.keys() and not (tmp_path / "again" / RECORD).exists()
    worst = max((found[name].double() - original[name].double()).abs().max().item() for name in found)
    assert not report.exact and 0 < worst <= report.error_bound < 0.02 * (1 if dtype == torch.bfloat16 else 1e-4)


def test_refused_unmerges(base: Path, adapter: Path, tmp_path: Path) -> None:
    def of(model: Path, **others: Path) -> Callable[[Path], object]:
        return lambda out: unmerge_adapter(model, out, **others)

    merged = tmp_path / "merged"
    merge_adapter(adapter, merged, check=False)
    refused(tmp_path, of(base), "has no relora_merge.json", "there is nothing to take out")
    refused(tmp_path, of(tmp_path / "gone"), "has no relora_merge.json")
    refused(tmp_path, lambda _: unmerge_adapter(merged, base), "is there already")
    other = base_folder("llama", tmp_path / "other", torch.float16)
    refused(tmp_path, of(merged, base=other), "other: is not what", "was merged into")
    base.rename(tmp_path / "away")
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text() + "\n")
    refused(tmp_path, of(merged), "neither its base", "nor its adapter", "--base or --adapter")
    record = (merged / RECORD).read_text()
    for broken in ("{}", "[", record.replace('"base_files": {\n', '"base_files": {\n "../../x": "1",\n')):
        (merged / RECORD).write_text(broken)
        refused(tmp_path, of(merged), str(merged))
    (merged / RECORD).write_text(record)
    weights = min(merged.glob("*.safetensors"))
    changed = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(changed, weights)
    refused(tmp_path, of(merged, base=tmp_path / "away"), weights.name, "has changed since the merge")


@pytest.mark.parametrize("kind", [{"dora": True}, {"trained_modules": ("lm_head",)}])
def test_what_cannot_be_subtracted_needs_the_base(kind: dict[str, Any], tmp_path: Path) -> None:
    base = base_folder("llama", tmp_path / "base")
    merge_adapter(adapter_folder("llama", tmp_path / "adapter", base, **kind), tmp_path / "merged", check=False)
    shutil.rmtree(base)
    refused(tmp_path, lambda out: unmerge_adapter(tmp_path / "merged", out), "only the base", "--base")


def test_names_that_transformers_changes_when_it_opens_a_model(tmp_path: Path) -> None:
    """GPT-NeoX calls its head embed_out in files."""
    base = base_folder("neox", tmp_path / "base")
    assert "embed_out.weight" in tensors(base)
    adapter = adapter_folder("neox", tmp_path / "adapter", base, trained_modules=("lm_head",))
    report = merge_adapter(adapter, tmp_path / "merged")
    assert report.largest_logit_difference is not None and report.largest_logit_difference < 1e-4
    assert torch.equal(tensors(tmp_path / "merged")["embed_out.weight"], read_adapter(adapter).others["lm_head.weight"])


def test_what_is_not_copied_is_said(
    base: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Chat templates, code and all other files at the top go along; other folders and other weights are named."""
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("{}")
    kept = ("chat_template.jinja", "generation_config.json", "added_tokens.json", "modeling_own.py", "tokenizer.model")
    for name in kept:
        (base / name).write_text("{}")
    merge_adapter(adapter, tmp_path / "merged")
    unmerge_adapter(tmp_path / "merged", tmp_path / "again")
    for folder in (tmp_path / "merged", tmp_path / "again"):
        assert (folder / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"
        assert {file.name for file in folder.iterdir()} >= set(kept) and not (folder / "original").exists()
    assert f"{base}: not copied: original/, pytorch_model.bin" in caplog.text


def test_buffers_and_shared_weights_go_along(tmp_path: Path) -> None:
    """Every tensor of the base that the adapter does not change is in the merged model, bit for bit."""
    for family in FAMILIES:
        base = base_folder(family, tmp_path / family)
        adapter = adapter_folder(family, tmp_path / f"{family}-adapter", base, target_modules="all-linear")
        merge_adapter(adapter, tmp_path / f"{family}-merged", check=False)
        before, after = tensors(base), tensors(tmp_path / f"{family}-merged")
        changed = {f"{path}.weight" for path in read_adapter(adapter).layers}
        assert before.keys() == after.keys()
        assert {name for name in before if not torch.equal(before[name], after[name])} == changed
        assert (
            built(family).config.tie_word_embeddings
            == open_model(tmp_path / f"{family}-merged").config.tie_word_embeddings
        )
