"""The lists of repeated blocks in a model, and the linear layers that `all-linear` finds in them."""

from torch import nn

from relora.lowrank import LowRankConfig, inject
from relora.lowrank.blocks import block_lists, is_inside


class Parallel(nn.Module):
    """Blocks spread over two lists, as in XLM; experts in a list of their own inside a block; an empty list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.attentions = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.experts = nn.ModuleDict({"list": nn.ModuleList(nn.ModuleList([nn.Linear(8, 8)]) for _ in range(2))})
        self.unused = nn.ModuleList()
        self.attentions_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 8)


def test_lists_inside_a_list_and_empty_ones_do_not_count() -> None:
    assert list(block_lists(Parallel())) == ["attentions", "experts.list"]
    assert block_lists(nn.Linear(2, 2)) == {}


def test_a_model_that_is_a_list_itself_is_the_one_list() -> None:
    assert list(block_lists(nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])]))) == [""]


def test_a_path_is_inside_whole_names_only() -> None:
    assert is_inside("attentions.0", ["attentions"]) and is_inside("attentions.0", [""])
    assert not is_inside("attentions_norm", ["attentions"]) and not is_inside("attentions", ["attentions"])
    assert not is_inside("attentions.0", [])


def test_all_linear_takes_the_layers_of_every_list_and_not_the_head() -> None:
    targets = inject(Parallel(), LowRankConfig(r=2)).targets
    assert list(targets) == ["attentions.0", "attentions.1", "experts.list.0.0", "experts.list.1.0"]
