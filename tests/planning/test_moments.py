"""A plan counts the moments that the run's optimizer really keeps."""

from pathlib import Path

import pytest
import torch
from torch import nn

from relora.config import RunConfig, parse_config
from relora.lowrank import inject
from relora.model.load import build_model
from relora.planning.moments import moments_of
from relora.recipes.from_settings import lowrank_of, optimizer_of
from relora.train.optim import build_optimizer

SHAPE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}


def configured(folder: Path, **optimizer: object) -> RunConfig:
    return parse_config(
        {
            "output_dir": str(folder),
            "model": {"preset": "llama-9m", **SHAPE},
            "data": {"train": "none", "validation": "none", "sequence_length": 16},
            "lowrank": {"r": 8},
            "schedule": {"total_steps": 10, "warmup_steps": 0},
            "warm_start": {"steps": 1},
            "optimizer": optimizer,
        }
    )


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [{"factors": "adamw"}, {"factors": "muon"}, {"factors": "adamw", "matrices": "muon"}, {"matrices": "muon"}],
)
def test_bytes_are_those_of_the_real_optimizer(tmp_path: Path, optimizer: dict[str, object], low_rank: bool) -> None:
    config = configured(tmp_path, **optimizer)
    model = build_model("llama-9m", SHAPE, seed=0)
    planned, settings = moments_of(config, model), optimizer_of(config, model, lowrank_of(config))
    if low_rank:
        inject(model, lowrank_of(config))
    real = build_optimizer(model, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    real.step()
    counted = {
        id(parameter): sum(t.nbytes for key, t in real.state[parameter].items() if key != "step")
        for parameter in trained
    }
    assert {id(parameter): _bytes(planned(parameter)) for parameter in trained} == counted
    fewer = "muon" in (config.optimizer.factors if low_rank else config.optimizer.matrices)
    assert any(counted[id(p)] < 2 * p.nbytes for p in trained) == fewer


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_small_parameters_are_not_special(tmp_path: Path) -> None:
    moments = moments_of(configured(tmp_path), build_model("llama-9m", SHAPE, seed=0))
    assert [moment.shape for moment in moments(nn.Parameter(torch.zeros(3)))] == [torch.Size([3])] * 2
