"""Layers with fewer numbers than a weight, which train from scratch: W [out, in] is not stored.

    factorized   W = B A                  Kamalakara et al. 2022, arXiv 2209.13569; the factors are drawn as
                                          the model draws its weights
    spectral     the same with B = U sqrt(S), A = sqrt(S) Vᵀ of the r leading triplets of a drawn W: Khodak et al. 2021,
                                          arXiv 2105.01029
    refactored   as spectral, and every 200 steps B A is factorized like this anew and the optimizer forgets both:
                                          Glentis et al. 2025, arXiv 2505.22922
    CoLA         y = B silu(A x)          Liu et al. 2025, arXiv 2502.10940; factors drawn as in its
                                          published code, with the model's own nonlinearity kept as at 60M there
    SLTrain      W = B A + S              Han et al. 2024, arXiv 2406.02214; S has values at a share of
                                          random places that stay as they are drawn. A as in LoRA, B = 0, S uniform in
                                          ± 1/sqrt(in)

Scales beside a product (SLTrain's alpha / r) are 1: under AdamW they amount to a learning rate.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relora.lowrank.init import kaiming, principal_factors


class Factorized(nn.Module):
    """A linear layer y = B A x."""

    def __init__(self, first_a: Tensor, first_b: Tensor) -> None:
        """Build the layer from first values of A [r, in] and B [out, r]."""
        super().__init__()
        self.A, self.B = nn.Parameter(first_a.contiguous()), nn.Parameter(first_b.contiguous())

    @classmethod
    def drawn(cls, weight: Tensor, r: int, generator: torch.Generator) -> "Factorized":
        """Draw both factors from a normal distribution as wide as that of `weight`."""
        out_features, in_features = weight.shape
        a, b = (torch.randn(shape, generator=generator) for shape in ((r, in_features), (out_features, r)))
        return cls(a * weight.std(), b * weight.std())

    @classmethod
    def spectral(cls, weight: Tensor, r: int, generator: torch.Generator) -> "Factorized":
        """Factorize the best approximation of rank r to `weight`."""
        return cls(*principal_factors(weight, r, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] by both factors."""
        return F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def refactor_(self) -> None:
        """Balance the factors by the singular values of their product, which stays as it is."""
        a, b = principal_factors(self.B @ self.A, len(self.A), 1.0)
        self.A.copy_(a)
        self.B.copy_(b)


class Cola(Factorized):
    """A linear layer with a nonlinearity between its factors."""

    @classmethod
    def drawn(cls, weight: Tensor, r: int, generator: torch.Generator) -> "Cola":
        """Draw both factors so that B A is as wide as 1 / sqrt(in + out)."""
        out_features, in_features = weight.shape
        width = r**-0.25 * (in_features + out_features) ** -0.25
        a, b = (torch.randn(shape, generator=generator) for shape in ((r, in_features), (out_features, r)))
        return cls(a * width, b * width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute B silu(A x) of x [..., in]."""
        return F.linear(F.silu(F.linear(x, self.A)), self.B)


class SparseAndLowRank(nn.Module):
    """A linear layer y = (B A + S) x; `places` are the indices of S's values in the flattened weight."""

    places: Tensor

    def __init__(self, shape: torch.Size, r: int, share: float, generator: torch.Generator) -> None:
        """Draw the layer; `share` of the weight's entries are S's."""
        super().__init__()
        out_features, in_features = shape
        count = int(share * out_features * in_features)
        bound = 1 / math.sqrt(in_features)
        self.shape = shape
        self.A = nn.Parameter(kaiming((r, in_features), generator))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        self.values = nn.Parameter(torch.empty(count).uniform_(-bound, bound, generator=generator))
        places = torch.randperm(out_features * in_features, generator=generator)[:count]
        self.register_buffer("places", places.sort().values)

    def weight(self) -> Tensor:
        """Return B A + S [out, in]."""
        return (self.B @ self.A).flatten().index_add(0, self.places, self.values).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., in] by the weight."""
        return F.linear(x, self.weight())
