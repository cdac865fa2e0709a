"""An adapter in memory: the low-rank updates of a base model's layers, and the tensors that were trained in full.

W' = W + s B A                          s = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
W' = m (W + s B A) / |W + s B A|        with DoRA, row by row
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from relora.lowrank.dora import row_norms


@dataclass(frozen=True)
class Factors:
    """The low-rank update of one linear layer: s·B A and, with DoRA, a magnitude for each row."""

    lora_A: Tensor
    """[r, in]"""
    lora_B: Tensor
    """[out, r]"""
    scaling: float
    """s: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
    magnitude: Tensor | None = None
    """m [out] of DoRA (Liu et al. 2024, arXiv 2402.09353, section 4.1); None in plain LoRA."""
    of_embedding: bool = False
    """The layer is an embedding [in, out], whose rows are the ids: A [r, ids], B [width, r]."""

    @property
    def r(self) -> int:
        """Rank of the update."""
        return self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the layer."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the update: A, B and, with DoRA, the magnitude."""
        return (self.lora_A, self.lora_B) if self.magnitude is None else (self.lora_A, self.lora_B, self.magnitude)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return s·B A [out, in], in `dtype` or the factors' dtype, whichever is more precise.

        DoRA's magnitude is not part of it.
        """
        dtype = torch.promote_types(dtype, self.lora_A.dtype)
        return (self.scaling * self.lora_B.to(dtype)) @ self.lora_A.to(dtype)

    def added_to(self, weight: Tensor) -> Tensor:
        """Return the updated weight W' [out, in] for the weight W [out, in], in fp32 or better."""
        delta = self.delta(torch.promote_types(weight.dtype, torch.float32))
        sums = delta.add_(weight.to(delta.dtype))
        return sums if self.magnitude is None else sums.mul_(self.row_scale(sums)[:, None])

    def row_scale(self, sums: Tensor) -> Tensor:
        """Return DoRA's factor m / |W + s B A| [out] of each row.

        Args:
            sums: the sums W + s B A [out, in]; a row of zeros counts with the smallest positive norm (see `row_norms`).
        """
        assert self.magnitude is not None
        return self.magnitude.to(sums.dtype) / row_norms(sums)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in memory: the content of an adapter folder."""

    layers: Mapping[str, Factors]
    """Updates by the path of their layer in the base model."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that were trained in full, by their key in the base model's state dict."""
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    """Copies of the base's weights that PEFT put beside their factors, by their key (see `whole_tensors`)."""
    rows: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    """Rows of embeddings that were trained in full (PEFT's `trainable_token_indices`): key -> id -> row [width]."""
    base: str | None = None
    """Folder or hub id of the base model, as it was named when the adapter was made."""
    revision: str | None = None
    """Revision of the base on the hub; None for its main branch."""
    targets: tuple[str, ...] = ()
    """Last parts of paths that select exactly the layers in the base model; empty if only their whole paths do."""
    rslora: bool = False
    dropout: float = 0.0
    """Dropout on the input of the factors in training."""
    fan_in_fan_out: bool = False
    """Whether the base's layers are GPT-2's `Conv1D`; the factors do not depend on it, but PEFT needs to know."""
    tied: bool = False
    """Whether `others` holds tied weights, once under each of their names."""
    task_type: str | None = None
    """PEFT's name of the model's task, such as `CAUSAL_LM`."""
    notes: tuple[str, ...] = ()
    """Lines on what of the folder has no effect (see `notes`)."""

    @property
    def dora(self) -> bool:
        """Whether the layers have DoRA's magnitudes."""
        return any(factors.magnitude is not None for factors in self.layers.values())

    @property
    def beyond_linear(self) -> str | None:
        """The key of something that is neither factors of a linear layer nor a tensor in full; None without such."""
        embeddings = (f"{path}.lora_embedding_A" for path, factors in self.layers.items() if factors.of_embedding)
        return next(iter((*embeddings, *self.rows)), None)

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the adapter."""
        for factors in self.layers.values():
            yield from factors.tensors
        yield from self.others.values()
        yield from self.base_copies.values()
        for rows in self.rows.values():
            yield from rows.values()

    @property
    def parameters(self) -> int:
        """Number of entries of all its tensors; a tied weight counts once under each of its names."""
        return sum(tensor.numel() for tensor in self.tensors)

    def alphas(self) -> dict[str, float]:
        """Return lora_alpha of every layer by its path: the scaling times r, or times sqrt(r) with rsLoRA.

        The scaling was computed as a quotient, so the product is off by a rounding error. It is rounded away: to 12
        significant digits, and a whole number is returned as an `int`.
        """
        exact = {
            path: factors.scaling * (math.sqrt(factors.r) if self.rslora else factors.r)
            for path, factors in self.layers.items()
        }
        rounded = {path: float(f"{alpha:.12g}") for path, alpha in exact.items()}
        return {path: int(alpha) if alpha.is_integer() else alpha for path, alpha in rounded.items()}
