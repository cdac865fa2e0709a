"""ReLoRA in a plain PyTorch loop: a byte-level language model learns this very file, in seconds on a CPU.

    python examples/plain_loop.py

Four calls are all there is to it: `relora.Schedule` says what is due at a step, `relora.inject` begins the low-rank
phase, `relora.restart` merges the factors and draws new ones, `relora.merge` gives the plain model back.
"""

from pathlib import Path

import torch
from torch import nn

import relora

CONTEXT, PEAK_LR = 8, 5e-3

torch.manual_seed(0)
text = torch.tensor(list(Path(__file__).read_bytes()))
windows = text.unfold(0, CONTEXT + 1, 1)  # [n, 9]: eight bytes, and the one to predict
model = nn.Sequential()
model.embed, model.flat = nn.Embedding(256, 16), nn.Flatten()
model.hidden, model.bend = nn.Linear(CONTEXT * 16, 128), nn.GELU()
model.inner, model.head = nn.Linear(128, 128), nn.Linear(128, 256)

schedule = relora.Schedule(
    total_steps=500, warmup_steps=20, warm_start_steps=100, restart_every_steps=100, restart_warmup_steps=10
)
optimizer = torch.optim.AdamW(model.parameters())
losses: list[float] = []
for step in range(schedule.total_steps):
    if step and step == schedule.cycle_start(step):
        print(f"step {step}: mean loss since the last boundary {sum(losses) / len(losses):.3f}")
        losses.clear()
    if schedule.switch_due(step):  # the warm start is over
        print(relora.inject(model, relora.LowRankConfig(r=8, lora_alpha=8, target_modules=("hidden", "inner"))))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)  # other tensors train now
    if schedule.restart_due(step):
        before = model(windows[:64, :-1]).detach()
        report = relora.restart(model, optimizer, cycle=schedule.cycle(step))
        moved = (model(windows[:64, :-1]) - before).abs().max().item()
        print(f"restart {report.cycle}: {len(report.layers)} updates merged, the output moved by {moved:.1e} at most")
    for group in optimizer.param_groups:
        group["lr"] = PEAK_LR * schedule.lr_factor(step)
    batch = windows[torch.randint(len(windows), (64,))]
    loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

relora.merge(model)  # plain nn.Linear layers again
print(f"step {schedule.total_steps}: mean loss since the last boundary {sum(losses) / len(losses):.3f}")
print(f"merged: {', '.join(model.state_dict())}")
