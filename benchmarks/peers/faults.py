r"""Kills, corruption, full disks and hostile files against the nearest peers, resumed as their manuals say.

    python -m venv .venv-trainer
    .venv-trainer/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
    .venv-trainer/bin/python benchmarks/peers/faults.py --peer trainer --trials 30 --seed 0

    python -m venv .venv-litgpt
    .venv-litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13 litdata==0.2.59
    .venv-litgpt/bin/pip uninstall -y torchvision
    .venv-litgpt/bin/python benchmarks/peers/faults.py --peer litgpt --trials 30 --corruptions 60 --terminations 6 \
        --disks 6 --seed 0 --other-disk /dev/shm

`trainer` is transformers.Trainer with PEFT: a random LLaMA, LoRA on all linear layers with dropout 0.05,
`full_determinism`, safetensors, `save_total_limit=2`, and `train(resume_from_checkpoint=True)` as soon as there is a
checkpoint. `litgpt` is `litgpt pretrain --data TextFiles --resume auto` on a model of the same shape in fp32. The two
cannot share an environment: litgpt wants an older huggingface-hub. It does not need the torchvision that litdata
brings, and does not import where that was built for another torch. Both train 40 steps on the repository's corpus and
save every 5 steps, with one thread; every run is a process of its own, forked after the imports, in which the peer's
own code runs.

A save takes a larger share of so short a run than of a long one, so that more of the random kills meet one: the
second set of kills, all aimed at saves, is the one to compare. The part with the full disk mounts a tmpfs and is left
out where that is not allowed.

Every trial ends with a run to the end. `bit-equal`: its weights are those of the run that nobody disturbed. `no error,
ANOTHER RESULT`: it ended with status 0 and other weights; `no error, within 1e-6`: with others, but by no more.
`not resumed`: it ended with an error.
"""

import argparse
import importlib
import importlib.metadata
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import campaigns
import torch
from lab import Lab
from peer import UNDISTURBED, Case

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Environment of every run; set before a peer is imported."""
PEERS = {"trainer": ("trainer_peer", "TrainerPeer"), "litgpt": ("litgpt_peer", "LitGPTPeer")}
"""Module and class; only the one asked for can be imported."""


def main() -> None:
    arguments = parse()
    os.environ.update(SETTINGS)
    torch.set_num_threads(1)
    module, name = PEERS[arguments.peer]
    peer = getattr(importlib.import_module(module), name)()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="peers-") as place:
        work = Path(place)
        with campaigns.temporary_files_in(work):
            peer.prepare(work)
            lab = Lab(peer, work, random.Random(arguments.seed))
            run_all(lab, arguments)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *peer.packages))
    print(f"{arguments.peer}: {versions}; Python {sys.version.split()[0]}, seed {arguments.seed}")
    print(f"{lab.train_seconds:.2f} s of training a run, {1000 * lab.save_seconds:.0f} ms a save, ", end="")
    print(f"{time.monotonic() - began:.0f} s in all\n\n| fault | trials | outcome |\n|---|---|---|")
    for fault, count, words in lab.rows:
        print(f"| {fault} | {count} | {words} |")
    print("\nLast lines of the runs that were not resumed:")
    for reason, count in lab.reasons.most_common():
        print(f"- {count} x {reason}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--trials", type=int, default=30, help="kills, at random times and again aimed at saves")
    parser.add_argument("--corruptions", type=int, default=90, help="flips, zeroed pages and truncations together")
    parser.add_argument("--terminations", type=int, default=10, help="SIGTERMs")
    parser.add_argument("--disks", type=int, default=10, help="fill levels of a small disk")
    parser.add_argument("--other-disk", type=Path, help="a folder on another file system than TMPDIR, such as /dev/shm")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def run_all(lab: Lab, arguments: argparse.Namespace) -> None:
    """The campaigns in the order of the table."""
    campaigns.undisturbed(lab)
    campaigns.kills(lab, arguments.trials, campaigns.AT_RANDOM)
    campaigns.kills(lab, arguments.trials, campaigns.IN_SAVE)
    if arguments.other_disk:
        with campaigns.temporary_files_in(arguments.other_disk):
            where = ", TMPDIR on another file system"
            campaigns.kills(lab, arguments.trials // 2, campaigns.AT_FILE, where)
    template = campaigns.stopped(lab)
    campaigns.untouched(lab, template)
    campaigns.corruption(lab, template, arguments.corruptions)
    campaigns.terminations(lab, arguments.terminations, UNDISTURBED, "SIGTERM")
    if lab.peer.saves_on_signal:
        paced = Case(pause=0.2, signal_saves=True)
        campaigns.terminations(lab, arguments.terminations, paced, "SIGTERM, enable_jit_checkpoint")
    campaigns.not_a_number(lab)
    try:
        campaigns.full_disk(lab, template, arguments.disks, temporary_too=False)
        campaigns.full_disk(lab, template, arguments.disks, temporary_too=True)
    except subprocess.CalledProcessError as refused:
        print(f"no full disk: {refused}", file=sys.stderr)
    campaigns.hostile_pickles(lab, template, unguarded=False)
    campaigns.hostile_pickles(lab, template, unguarded=True)


if __name__ == "__main__":
    main()
