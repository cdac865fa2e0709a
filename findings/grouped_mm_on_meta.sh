#!/usr/bin/env bash
# torch 2.13.0: the CPU kernel of torch._grouped_mm, which transformers 5 uses for fused experts, takes float32 and gives
# the right product, but its meta kernel refuses the same tensors, so a model that runs cannot be traced with fake
# tensors (memory planning, export) unless its experts are bf16 or another implementation is chosen.
#
# Seen (torch 2.13.0, CPU):
#   cpu: float32 (8, 16) largest error 0 or a few 1e-6
#   meta: RuntimeError: Expected inputs of BF16 type but got mat_a.dtype=torch.float32 and mat_b.dtype=torch.float32.
#   meta, bfloat16: (8, 16)
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)
torch.manual_seed(0)
tokens, experts = torch.randn(8, 32), torch.randn(2, 32, 16)
ends = torch.tensor([3, 8], dtype=torch.int32)  # rows 0-2 go to expert 0, rows 3-7 to expert 1
product = torch._grouped_mm(tokens, experts, offs=ends)
expected = torch.cat([tokens[:3] @ experts[0], tokens[3:] @ experts[1]])
error = (product - expected).abs().max().item()
print("cpu:", product.dtype, tuple(product.shape), "largest error", error)
assert error < 1e-4
try:
    torch._grouped_mm(tokens.to("meta"), experts.to("meta"), offs=ends.to("meta"))
except RuntimeError as problem:
    print("meta: RuntimeError:", problem)
    assert "BF16" in str(problem)
else:
    raise SystemExit("the meta kernel takes float32 now")
bf16 = torch._grouped_mm(tokens.bfloat16().to("meta"), experts.bfloat16().to("meta"), offs=ends.to("meta"))
print("meta, bfloat16:", tuple(bf16.shape))
PY
