"""A LLaMA whose longest list of modules is not its blocks: more experts in each block than there are blocks."""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from relora.model.load import build_model

BLOCKS, EXPERTS = 3, 8
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
}


class Experts(nn.Module):
    """The mean of several feed-forward layers, kept in a list (as Mixtral's were) or under names of their own."""

    def __init__(self, expert: nn.Module, *, in_list: bool) -> None:
        super().__init__()
        experts = [copy.deepcopy(expert) for _ in range(EXPERTS)]
        self.experts = nn.ModuleList(experts) if in_list else nn.Sequential(*experts)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [expert(x) for expert in self.experts]
        return sum(outputs[1:], outputs[0]) / EXPERTS


def with_experts(*, in_list: bool = True) -> PreTrainedModel:
    """Build the model on the current device."""
    model = build_model("llama-9m", SHAPE, seed=0)
    for block in model.model.layers:
        block.mlp = Experts(block.mlp, in_list=in_list)
    return model
