#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: a mixture of experts that has dense MLPs of the same projection names beside its
# fused experts (GLM-4-MoE: a dense first layer, a shared expert). An adapter with gate_proj, up_proj and down_proj on
# those dense MLPs, named by full path, is loaded without an error, and its factors are not applied: PEFT converts the
# three names to the fused experts and gives these new factors (B = 0).
#
# Seen (CPU):
#   layers of the adapter: 6; with a non-zero lora_B after loading: 0
#   by loading, the logits return to those of the base: True
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy transformers==5.23.0 peft==0.21.2
cd "$folder"
venv/bin/python - <<'PY'
import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = Glm4MoeConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2, head_dim=16, moe_intermediate_size=16, n_routed_experts=4,
                       n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1)
AutoModelForCausalLM.from_config(config).save_pretrained("base")
base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32).eval()
paths = [name for name, module in base.named_modules()
         if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj")]
Path("adapter").mkdir()
tensors = {}
for path in paths:
    out, inn = base.get_submodule(path).weight.shape
    tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(4, inn)
    tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, 4)
save_file(tensors, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
Path("adapter/adapter_config.json").write_text(json.dumps(
    {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": paths}))
ids = torch.arange(16).view(1, -1)
before = base(input_ids=ids).logits.detach()
model = PeftModel.from_pretrained(base, "adapter").eval()
alive = sum(parameter.abs().max().item() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)
same = torch.allclose(model(input_ids=ids).logits, before, atol=1e-6)
print(f"layers of the adapter: {len(paths)}; with a non-zero lora_B after loading: {alive}")
print("by loading, the logits return to those of the base:", same)
assert len(paths) == 6 and alive < len(paths)
PY
