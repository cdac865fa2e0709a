"""Where the time of a step goes, by kind, from torch.profiler's own time of every operator."""

import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

PRODUCTS, HEAD, ATTENTION, ELEMENTWISE = "products in the blocks", "products of the head", "attention", "elementwise"
LOSS, OPTIMIZER, COPIES, REST = "loss", "optimizer and clipping", "copies and allocation", "outside of operators"
WORDS = (
    (ATTENTION, ("scaled_dot_product", "flash_attention")),
    (PRODUCTS, ("::mm", "addmm", "bmm", "baddbmm", "_int_mm", "mkldnn_linear", "conv1d", "convolution", "::dot")),
    (LOSS, ("log_softmax", "logsumexp", "nll_loss", "cross_entropy")),
    (OPTIMIZER, ("adamw", "_foreach_", "linalg_vector_norm")),
    (COPIES, ("copy_", "empty", "zero", "fill_", "clone", "contiguous", "::cat", "::to", "resize", "new_", "ones")),
)
"""Kind -> parts of operators' names, the first that fits; what fits nowhere is elementwise (norms, activations,
rotations, additions, reductions, quantization, and the embedding)."""
KINDS = (PRODUCTS, HEAD, ATTENTION, ELEMENTWISE, LOSS, OPTIMIZER, COPIES, REST)


@dataclass(frozen=True)
class Profile:
    """One step."""

    seconds: float
    """Wall clock; with the profiler on, some per cent longer than without."""
    by_kind: dict[str, float]
    """Seconds; they sum up to the wall clock."""
    top: list[tuple[str, float, int]]
    """The ten operators that take most: name, seconds, calls."""
    system_seconds: float
    """Of all threads in the kernel: page faults of fresh memory, mostly. Contained in the kinds above."""
    page_faults: int


def profiled(step: Callable[[], float], vocabulary: int) -> Profile:
    """One step under the profiler; a product is the head's if one of its sides is as long as the vocabulary."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF)
    by_kind: Counter[str] = Counter(dict.fromkeys(KINDS, 0.0))
    for event in recorded.key_averages(group_by_input_shape=True):
        by_kind[kind_of(event.key, event.input_shapes, vocabulary)] += event.self_cpu_time_total / 1e6
    by_kind[REST] += seconds - sum(by_kind.values())
    top = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)[:10]
    return Profile(
        seconds=seconds,
        by_kind=dict(by_kind),
        top=[(event.key, event.self_cpu_time_total / 1e6, event.count) for event in top],
        system_seconds=after.ru_stime - before.ru_stime,
        page_faults=after.ru_minflt - before.ru_minflt,
    )


def kind_of(name: str, shapes: list[list[int]], vocabulary: int) -> str:
    """The kind of an event of the profiler; what autograd and its Python functions do themselves is no operator."""
    if not name.startswith("aten::"):
        return OPTIMIZER if name.startswith("Optimizer.") else REST
    kind = next((kind for kind, words in WORDS if any(word in name for word in words)), ELEMENTWISE)
    return HEAD if kind == PRODUCTS and any(vocabulary in shape for shape in shapes) else kind
