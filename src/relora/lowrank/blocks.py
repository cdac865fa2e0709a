"""The lists in which a model keeps its repeated blocks, found by structure.

A language model keeps its blocks in an `nn.ModuleList`, and embeddings, final norm and output head outside it. Most
models have one such list. A model has several if it is an encoder with a decoder, or an image tower with a language
model, or if its blocks are spread over parallel lists (XLM: attentions in one, feed-forward layers in another).
"""

from collections.abc import Iterable

from torch import nn


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Find every `nn.ModuleList` that has elements and is not inside another one.

    A list inside a block, like the experts of a mixture of experts, is a part of that block, however long it is.

    Returns:
        The lists by their path in the model, in model order; empty if there are none.
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not is_inside(path, found):
            found[path] = module
    return found


def is_inside(path: str, outer_paths: Iterable[str]) -> bool:
    """Tell whether the module at `path` is inside one of the modules at `outer_paths`; the model itself is at ""."""
    return any(not outer or path.startswith(f"{outer}.") for outer in outer_paths)
