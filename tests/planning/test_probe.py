"""Real steps in a process of their own: with the run's settings, and told apart from a lack of memory."""

import math
from typing import Any

import pytest
import torch

from relora.config import RunConfig, parse_config
from relora.errors import RunStopped, UserError
from relora.planning.probe import model_and_optimizer, probe

CPU = torch.device("cpu")


def configuration(**changes: Any) -> RunConfig:
    """A model of two small layers; `changes` replace whole sections."""
    tree = {
        "output_dir": "none",
        "device": "cpu",
        "model": {
            "preset": "llama-9m",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
        },
        "data": {"train": "none", "validation": "none", "sequence_length": 16},
        "lowrank": {"r": 4},
        "schedule": {"total_steps": 4, "warmup_steps": 0},
        "warm_start": {"steps": 1},
        "precision": {"dtype": "fp32"},
        "batch": {"sequences": 2, "micro_sequences": 1},
    }
    return parse_config(tree | changes)


@pytest.mark.parametrize("phase", ["warm_start", "low_rank"])
def test_steps_are_taken_with_the_optimizer_settings_of_the_run(phase: Any) -> None:
    settings = {
        "lr": 1e-3,
        "matrix_lr": 2e-3,
        "lowrank_lr": 4e-3,
        "lowrank_b_lr_ratio": 8.0,
        "betas": [0.8, 0.88],
        "eps": 1e-5,
        "weight_decay": 0.3,
    }
    model, optimizer = model_and_optimizer(configuration(optimizer=settings), phase, CPU)
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    found = {
        name: (group["betas"], group["eps"], group["weight_decay"], group["lr"])
        for name, parameter in model.named_parameters()
        if (group := groups.get(id(parameter))) is not None
    }
    assert {(betas, eps) for betas, eps, _, _ in found.values()} == {((0.8, 0.88), 1e-5)}
    decayed = {name: lr for name, (_, _, decay, lr) in found.items() if decay == 0.3}
    if phase == "low_rank":
        rates = {"lora_A": 4e-3, "lora_B": 32e-3}
        assert {lr for name, lr in decayed.items() if "lora_A" in name} == {rates["lora_A"]}
        assert {lr for name, lr in decayed.items() if "lora_B" in name} == {rates["lora_B"]}
    else:
        assert decayed["model.layers.0.mlp.up_proj.weight"] == 2e-3
    assert decayed["lm_head.weight"] == 1e-3


def test_a_probe_measures_a_process_of_its_own() -> None:
    measured = probe(configuration(), "low_rank")
    assert measured.peak > 100e6 and 0 < measured.step_seconds < math.inf


def test_what_the_run_would_refuse_comes_back_as_the_same_mistake() -> None:
    with pytest.raises(UserError, match=r"lowrank\.r \(400\) exceeds"):
        probe(configuration(lowrank={"r": 400}), "low_rank")


def test_a_lack_of_memory_is_said_to_be_one() -> None:
    """The ids of a batch of 2**48 tokens alone take more than a process can address."""
    huge = configuration(batch={"sequences": 2**44, "micro_sequences": 1})
    with pytest.raises(RunStopped, match="the warm start step died, most likely for lack of memory; `relora plan"):
        probe(huge, "warm_start")
