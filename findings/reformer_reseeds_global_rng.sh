#!/usr/bin/env bash
# transformers 5.23.0: a forward pass of Reformer in training mode draws seeds with torch.seed(), which takes them from the
# system, and sets the global generator to them, also where every dropout is 0. Whatever is drawn afterwards differs from
# run to run although the caller seeded torch, so a training that relies on the global seed is not repeatable.
#
# Seen (transformers 5.23.0, torch 2.13.0), three passes, each after torch.manual_seed(7):
#   training: the next torch.rand(1) is another number each time
#   evaluation: it is the same number each time
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet transformers==5.23.0 torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import ReformerConfig, ReformerModelWithLMHead

print("transformers", transformers.__version__)
torch.manual_seed(0)
model = ReformerModelWithLMHead(
    ReformerConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, attention_head_size=8, feed_forward_size=16,
        attn_layers=["local"], local_attn_chunk_length=8, axial_pos_embds=False, max_position_embeddings=32,
        is_decoder=True, eos_token_id=1, pad_token_id=0, hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    )
)
ids = torch.randint(2, 40, (1, 16))
distinct = {}
for mode in (True, False):
    model.train(mode)
    numbers = []
    for _ in range(3):
        torch.manual_seed(7)
        with torch.no_grad():
            model(ids)
        numbers.append(torch.rand(1).item())
    distinct[mode] = len(set(numbers))
    print("training" if mode else "evaluation", "drew", distinct[mode], "different numbers from one seed")
assert distinct == {True: 3, False: 1}
PY
