#!/usr/bin/env bash
# PEFT 0.21.2: LoRA factors on the head of a model whose head and embedding share one tensor. `merge_and_unload` gives
# another function than the model computed before the merge: the update is added to the shared tensor, so it changes
# the embedding as well. No error; a warning at most. Untied, or with the head untied before the merge, both agree.
#
# Seen (transformers 5.23.0, PEFT 0.21.2, torch 2.13.0, CPU, float64):
#   tied:   largest difference of logits by merging: 22.3
#   untied: largest difference of logits by merging: 3.55e-15
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")


def moved_by_merging(tied: bool) -> float:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, tie_word_embeddings=tied)
    model = get_peft_model(LlamaForCausalLM(config).double(), LoraConfig(r=4, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(16).view(1, -1)
    before = model.eval()(input_ids=ids).logits.detach()
    return (model.merge_and_unload().eval()(input_ids=ids).logits - before).abs().max().item()


tied, untied = moved_by_merging(True), moved_by_merging(False)
print(f"tied:   largest difference of logits by merging: {tied:.3g}")
print(f"untied: largest difference of logits by merging: {untied:.3g}")
assert tied > 1e-2 and untied < 1e-9
PY
