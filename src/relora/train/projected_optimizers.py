"""GaLore, APOLLO and Fira, as their authors publish them: what low-rank training of full-rank weights is held against.

A matrix W [m, n] trains at full rank, and its moments are kept in a space of rank r that is renewed every so often:

    GaLore   W -= lr · scale · P adam(Pᵀ G)        P: leading singular vectors of the gradient G
    Fira     as GaLore, and W -= lr · f (G - scale · P Pᵀ G), where f = |adam(Pᵀ G)| / |Pᵀ G| for each channel
    APOLLO   W -= lr · sqrt(scale) · f G           P: random

(Zhao et al. 2024, arXiv 2403.03507; Chen et al. 2024, arXiv 2410.01623; Zhu et al. 2024, arXiv 2412.05270). So train
the matrices of the blocks; everything else goes by the packages' own AdamW. State of a matrix: r · (2 max(m, n) +
min(m, n)) numbers instead of 2 m n. The price: an SVD of every gradient at each renewal (none in APOLLO), and an update
that is not fused. apollo-torch may not be used commercially (CC BY-NC).

The packages' projectors are objects. What is saved of one is its matrix and, of APOLLO's, the seed of the next, which
comes from the place of the parameter and not from the run's seed.
"""

import importlib.util
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.inject import find_targets

Layout = dict[str, tuple[torch.Size, bool]]
"""Of one parameter's state: the shape of each tensor, and whether it is floating point."""


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """The space that moments are kept in."""

    rank: int = 128
    every_steps: int = 200
    """Steps from one space to the next."""
    scale: float | None = None
    """As the package takes it; None for what its authors pretrain with."""


@dataclass(frozen=True, kw_only=True)
class _Package:
    """What a package calls things."""

    distribution: str
    modules: tuple[str, ...]
    """Its own, and what that imports."""
    extra: str = "baselines"
    scale_key: str = "scale"
    scale: float
    group: dict[str, str] = field(default_factory=dict)
    """What a projected group says beside rank, period and scale."""
    norm: str | None = None
    """Key of the last update's norm, which limits the next one's."""
    seeded: bool = False


PROJECTED_OPTIMIZERS = {
    "galore": _Package(
        distribution="galore-torch",
        modules=("galore_torch", "bitsandbytes"),
        scale=0.25,
    ),
    "apollo": _Package(
        distribution="apollo-torch",
        extra="apollo",
        modules=("apollo_torch", "bitsandbytes"),
        scale=1.0,
        group={"proj": "random", "scale_type": "channel"},
        norm="scaled_grad",
        seeded=True,
    ),
    "fira": _Package(
        distribution="fira",
        modules=("fira",),
        scale_key="alpha",
        scale=0.25,
        norm="scaling_grad",
    ),
}
"""By the name of the optimizer."""


def check_installed(name: str) -> None:
    """`UserError` naming the extra where the package, or what it imports, is absent; loads nothing."""
    package = PROJECTED_OPTIMIZERS[name]
    for module in package.modules:
        if importlib.util.find_spec(module) is None:
            needed = package.distribution if module == package.modules[0] else module
            raise UserError(
                f"optimizer.name: {name} needs {needed}, which is not installed; "
                f"run: pip install 'relora[{package.extra}]'"
            )


def projected_matrices(model: nn.Module, rank: int) -> dict[str, nn.Parameter]:
    """By name, the matrices of the blocks (`all-linear`), whose moments are kept at a rank.

    Raises:
        UserError: the rank exceeds the smaller side of one, or there is none.
    """
    names = [f"{path}.weight" for path in find_targets(model, LowRankConfig(r=1))]
    matrices = {name: model.get_parameter(name) for name in names}
    for name, matrix in matrices.items():
        if rank > min(matrix.shape):
            shape = " x ".join(str(side) for side in matrix.shape)
            raise UserError(
                f"optimizer.projection.rank ({rank}) exceeds the smaller side of {name} ({shape}); "
                f"it may be at most {min(matrix.shape)} here"
            )
    return matrices


def state_shapes(shape: torch.Size, rank: int) -> tuple[torch.Size, torch.Size]:
    """Of a matrix [m, n]: that of m and of v, and that of the projection. The smaller side is projected."""
    m, n = shape
    if m >= n:
        return torch.Size([m, rank]), torch.Size([rank, n])
    return torch.Size([rank, n]), torch.Size([m, rank])


def build_projected_optimizer(
    model: nn.Module,
    groups: list[dict[str, Any]],
    name: str,
    projection: ProjectionConfig,
    *,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """A package's optimizer over AdamW's groups, the matrices of the blocks projected."""
    package = PROJECTED_OPTIMIZERS[name]
    matrices = {id(matrix) for matrix in projected_matrices(model, projection.rank).values()}
    projected = {
        "rank": projection.rank,
        "update_proj_gap": projection.every_steps,
        package.scale_key: package.scale if projection.scale is None else projection.scale,
        "proj_type": "std",
        **package.group,
    }
    split = []
    for group in groups:
        inside = [parameter for parameter in group["params"] if id(parameter) in matrices]
        outside = [parameter for parameter in group["params"] if id(parameter) not in matrices]
        split += [group | {"params": outside}, group | {"params": inside} | projected]
    groups = [group for group in split if group["params"]]
    kind, _ = _classes(name)
    optimizer: torch.optim.Optimizer = kind(groups, betas=betas, eps=eps, no_deprecation_warning=True)
    optimizer.register_step_post_hook(_own_storage)
    return optimizer


def projected_optimizer_name(optimizer: torch.optim.Optimizer) -> str | None:
    """The name of a baseline's optimizer, None of any other."""
    module = type(optimizer).__module__.partition(".")[0]
    return next((name for name, package in PROJECTED_OPTIMIZERS.items() if package.modules[0] == module), None)


def saved_state(state: dict[str, Any]) -> dict[str, Any]:
    """One parameter's state without objects, and without what its optimizer is born with; any optimizer's."""
    kept = {key: value for key, value in state.items() if key not in ("projector", "seed")}
    if "projector" in state:
        kept["projection"] = state["projector"].ortho_matrix
        if hasattr(state["projector"], "seed"):
            kept["projection_seed"] = state["projector"].seed
    return kept


def restore_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
    """Inverse of `saved_state`, for a baseline's optimizer."""
    numbers = {key: int(saved[key]) for key in ("step", "projection_seed") if key in saved}
    state: dict[str, Any] = {key: tensor.to(parameter.device) for key, tensor in saved.items() if key not in numbers}
    state["step"] = numbers["step"]
    if "projection" in state:
        group, name = _group_of(optimizer, parameter), _name_of(optimizer)
        scale_key = PROJECTED_OPTIMIZERS[name].scale_key
        _, kind = _classes(name)
        projector = kind(
            group["rank"],
            update_proj_gap=group["update_proj_gap"],
            proj_type=group["proj_type"],
            **{scale_key: group[scale_key]},
        )
        projector.ortho_matrix = state.pop("projection")
        if "projection_seed" in numbers:
            projector.seed = numbers["projection_seed"]
        state["projector"] = projector
    optimizer.state[parameter].update(state)


def projected_layout(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Layout:
    """What a baseline's optimizer has of a parameter that it has stepped, as `saved_state` gives it."""
    package, group = PROJECTED_OPTIMIZERS[_name_of(optimizer)], _group_of(optimizer, parameter)
    step: Layout = {"step": (torch.Size(), False)}
    if "rank" not in group:
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), (parameter.shape, True)) | step
    moment, projection = state_shapes(parameter.shape, group["rank"])
    layout = dict.fromkeys(("exp_avg", "exp_avg_sq"), (moment, True)) | {"projection": (projection, True)} | step
    if package.norm:
        layout[package.norm] = (torch.Size(), True)
    if package.seeded:
        layout["projection_seed"] = (torch.Size(), False)
    return layout


def _classes(name: str) -> tuple[Any, Any]:
    """A package's optimizer and projector."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels that no optimizer uses
    if name == "galore":
        from galore_torch import GaLoreAdamW
        from galore_torch.galore_projector import GaLoreProjector

        return GaLoreAdamW, GaLoreProjector
    if name == "apollo":
        from apollo_torch import APOLLOAdamW
        from apollo_torch.random_projector import GradientProjector

        return APOLLOAdamW, GradientProjector
    from fira import FiraAdamW
    from fira.gradient_projection import GradientProjector as FiraProjector

    return FiraAdamW, FiraProjector


def _name_of(optimizer: torch.optim.Optimizer) -> str:
    name = projected_optimizer_name(optimizer)
    assert name is not None
    return name


def _group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(parameter is member for member in g["params"]))


def _own_storage(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """A fresh projection is a view of all singular vectors: it would hold min(m, n)² numbers instead of r min(m, n).

    And what is loaded from a checkpoint is laid out like this, so the products round alike.
    """
    for state in optimizer.state.values():
        if "projector" in state:
            projector = state["projector"]
            matrix = projector.ortho_matrix
            if not matrix.is_contiguous() or matrix.untyped_storage().nbytes() > matrix.nbytes:
                projector.ortho_matrix = matrix.clone(memory_format=torch.contiguous_format)
