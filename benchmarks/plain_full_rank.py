"""Full-rank training of benchmarks/methods.yaml in a plain PyTorch loop: a check of ours that shares only the batches.

    python benchmarks/plain_full_rank.py --lr 2e-3 --matrix-lr 4e-4

It wants the data that benchmarks/methods.py has prepared. `--matrix-lr` is the rate of the matrices in the blocks,
`--lr` that of everything else. It takes one thread and prints the perplexity of the first 60,000 held-out tokens.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from relora.data.batches import HeldOut, TrainBatches
from relora.data.shards import PreparedFolder

PREPARED = Path("prepared/methods")
LENGTH, SEQUENCES, STEPS, WARMUP = 128, 8, 1000, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--matrix-lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=5,
            num_attention_heads=4,
            max_position_embeddings=1024,
        )
    )
    train(model, arguments.lr, arguments.matrix_lr)
    print(f"lr {arguments.lr:g}, matrices {arguments.matrix_lr:g}: held-out perplexity {perplexity(model):.1f}")


def train(model: LlamaForCausalLM, lr: float, matrix_lr: float) -> None:
    batches = TrainBatches([(PreparedFolder.open(PREPARED / "train"), 1.0)], LENGTH, SEQUENCES, seed=0)
    matrices = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    inside = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    groups = [{"params": rest, "lr": lr}, {"params": matrices, "lr": matrix_lr}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)

    def factor(step: int) -> float:
        if step < WARMUP:
            return step / WARMUP
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(STEPS):
        ids, labels = batches.batch(step)
        F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM) -> float:
    held_out = HeldOut(PreparedFolder.open(PREPARED / "held-out" / "train"), LENGTH, 60_000, SEQUENCES)
    losses = (
        F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        for ids, labels in held_out
    )
    return math.exp(sum(losses) / held_out.targets)


if __name__ == "__main__":
    main()
