"""A LLaMA, what a step of it costs by formula, and how many layers fit; no torch, for the process that only counts.

A multiply-add is two operations. For one linear layer [o, i], T tokens and rank r a step costs

    full rank                    6·T·o·i
    PEFT, LitGPT, plain          4·T·o·i + 6·T·r·(i + o)                             all factored
    ours                         4·T·o·i + min(4·T·r·(i + o), 2·T·o·i + 4·r·o·i)     factored or dense gradients

with the head at full rank in all of them. Attention, the embedding and everything elementwise are not counted, so a
share of the peak is a cautious one; so is that of ours, whose formation of W + s·B·A is left out as well.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

SEQUENCE = 256
"""Tokens per sequence."""
KEPT = 0.85
"""Share of the free memory that may be taken."""


@dataclass(frozen=True)
class Place:
    """Where a side computes, and in what."""

    device: str = "cpu"
    bf16: bool = False
    """Products under autocast in bf16; weights, gradients and moments stay in fp32."""


CPU = Place()


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA with untied embeddings and as many key-value heads as heads."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int

    @property
    def heads(self) -> int:
        return self.hidden // 64

    @functools.cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: path -> (out, in)."""
        square, up = (self.hidden, self.hidden), (self.inner, self.hidden)
        attention = {f"self_attn.{kind}_proj": square for kind in "qkvo"}
        return attention | {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": up[::-1]}

    @property
    def in_blocks(self) -> int:
        """Parameters of the linear layers of all blocks."""
        return self.layers * sum(o * i for o, i in self.linears.values())

    @property
    def parameters(self) -> int:
        return self.in_blocks + 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def flops(self, side: str, rank: int, tokens: int) -> float:
        """Operations of one step, by the formulas above."""
        head = 6 * tokens * self.vocabulary * self.hidden
        if side == "full":
            return head + 6 * tokens * self.in_blocks
        return (
            head
            + 4 * tokens * self.in_blocks
            + self.layers * sum(factor_flops(side, rank, tokens, o, i) for o, i in self.linears.values())
        )

    def resident_bytes(self, side: str, tokens: int) -> int:
        """About what a side keeps between steps: weights, gradients, two moments, and the heap for activations, which
        the C library does not give back; and what Python and the libraries take."""
        trained = self.parameters - (0 if side == "full" else self.in_blocks)
        activations = 4 * tokens * self.layers * (18 * self.hidden + 4 * self.inner)
        return 4 * self.parameters + 12 * trained + activations + 500_000_000

    def logit_bytes(self, tokens: int) -> int:
        """About what a loss on whole logits takes: these, their logarithms, and the gradients of both."""
        return 16 * tokens * self.vocabulary


def factor_flops(side: str, rank: int, tokens: int, o: int, i: int) -> float:
    """What the factors of one layer add to its frozen products."""
    if not side.startswith("ours"):
        return 6 * tokens * rank * (i + o)
    return min(4 * tokens * rank * (i + o), 2 * tokens * o * i + 4 * rank * o * i)


def shape_that_fits(hidden: int, inner: int, most: int, vocabulary: int, tokens: int) -> Shape:
    """The deepest LLaMA of that width, up to `most` layers, whose full-rank training fits into the free memory."""
    shapes = (Shape(hidden, inner, layers, vocabulary) for layers in range(most, 1, -1))
    fitting = (s for s in shapes if fits(s.resident_bytes("full", tokens) + s.logit_bytes(tokens)))
    return next(fitting, Shape(hidden, inner, 1, vocabulary))


def fits(needed_bytes: int) -> bool:
    """Whether the free memory holds that, with a margin."""
    return needed_bytes < KEPT * available_bytes()


def available_bytes() -> int:
    """Main memory that is free or can be freed at once (Linux)."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
