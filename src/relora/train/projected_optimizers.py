"""GaLore, APOLLO and Fira in their authors' packages: full-rank training with moments in a projected space.

They serve as references that low-rank training is compared with. A matrix W [m, n] trains at full rank, and its
moments are kept in a space of rank r that is renewed every `every_steps` steps:

    GaLore   W -= lr · scale · P adam(Pᵀ G)        P: leading singular vectors of the gradient G
    Fira     as GaLore, and W -= lr · f (G - scale · P Pᵀ G), where f = |adam(Pᵀ G)| / |Pᵀ G| for each channel
    APOLLO   W -= lr · sqrt(scale) · f G           P: random

(GaLore: Zhao et al. 2024, arXiv 2403.03507; Fira: Chen et al. 2024, arXiv 2410.01623; APOLLO: Zhu et al. 2024, arXiv
2412.05270). The matrices of the blocks train like this, everything else with the packages' own AdamW. State of a
matrix: r · (2 max(m, n) + min(m, n)) numbers instead of 2 m n. The price is an SVD of every gradient at each renewal
(none in APOLLO), and an update that is not fused. apollo-torch may not be used commercially (CC BY-NC).

The packages keep each projector as an object in the optimizer's state. A checkpoint holds its matrix instead and, for
APOLLO, the seed of the next projection, which the package derives from the parameter's position, not the run's seed.
"""

import importlib.util
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from relora.errors import UserError
from relora.lowrank import LowRankConfig
from relora.lowrank.targets import find_targets

Layout = dict[str, tuple[torch.Size, bool]]
"""Layout of one parameter's state: by key, the shape of the tensor and whether it is floating point."""


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Settings of the space that moments are kept in."""

    rank: int = 128
    every_steps: int = 200
    """Steps from one renewal of the space to the next."""
    scale: float | None = None
    """Scale of the update, in the sense of the package; None for the value that its authors pretrain with."""


@dataclass(frozen=True, kw_only=True)
class _Package:
    """Names and defaults of one package."""

    distribution: str
    """Name on the package index."""
    modules: tuple[str, ...]
    """The package's own module first, then the modules that it imports."""
    extra: str = "baselines"
    """Extra of relora that installs the package."""
    scale_key: str = "scale"
    """Key under which a parameter group holds the scale."""
    scale: float
    """Scale that the package's authors pretrain with."""
    group: dict[str, str] = field(default_factory=dict)
    """Entries of a projected group beside rank, period and scale."""
    norm: str | None = None
    """Key in the state of the last update's norm, which limits that of the next update; None without a limit."""
    seeded: bool = False
    """Whether the projection is drawn from a seed."""


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
"""Package of each projected optimizer, by the optimizer's name in the configuration."""


def check_installed(name: str) -> None:
    """Raise `UserError`, which names the extra to install, if a module of the package is absent; load nothing."""
    package = PROJECTED_OPTIMIZERS[name]
    for module in package.modules:
        if importlib.util.find_spec(module) is None:
            needed = package.distribution if module == package.modules[0] else module
            raise UserError(
                f"optimizer.name: {name} needs {needed}, which is not installed; "
                f"run: pip install 'relora[{package.extra}]'"
            )


def projected_matrices(model: nn.Module, rank: int) -> dict[str, nn.Parameter]:
    """Return the matrices whose moments are projected, by name: those of `all-linear` that are large enough.

    Raises:
        UserError: the rank exceeds the smaller side of all of them, or the model has none.
    """
    names = [f"{path}.weight" for path in find_targets(model, LowRankConfig(r=1))]
    matrices = {name: model.get_parameter(name) for name in names}
    projected = {name: matrix for name, matrix in matrices.items() if rank <= min(matrix.shape)}
    if not projected:
        name, matrix = max(matrices.items(), key=lambda item: min(item[1].shape))
        shape = " x ".join(str(side) for side in matrix.shape)
        raise UserError(
            f"optimizer.projection.rank ({rank}) exceeds the smaller side of {name} ({shape}); "
            f"it may be at most {min(matrix.shape)} here"
        )
    return projected


def state_shapes(shape: torch.Size, rank: int) -> tuple[torch.Size, torch.Size]:
    """Return the shape of each moment of a matrix [m, n], and that of its projection. The smaller side is projected."""
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
    """Build a package's optimizer over the parameter groups of AdamW.

    Every group is split in two: the matrices of the blocks are projected, the rest is not.

    Args:
        name: key in `PROJECTED_OPTIMIZERS`.

    Raises:
        UserError: the rank exceeds the smaller side of a matrix.
    """
    package = PROJECTED_OPTIMIZERS[name]
    matrices = {id(matrix) for matrix in projected_matrices(model, projection.rank).values()}
    projected_entries = {
        "rank": projection.rank,
        "update_proj_gap": projection.every_steps,
        package.scale_key: package.scale if projection.scale is None else projection.scale,
        "proj_type": "std",
        **package.group,
    }
    split = []
    for group in groups:
        projected = [parameter for parameter in group["params"] if id(parameter) in matrices]
        others = [parameter for parameter in group["params"] if id(parameter) not in matrices]
        split += [group | {"params": others}, group | {"params": projected} | projected_entries]
    groups = [group for group in split if group["params"]]
    optimizer_class, _ = _classes(name)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, betas=betas, eps=eps, no_deprecation_warning=True)
    optimizer.register_step_post_hook(_copy_projections)
    return optimizer


def projected_optimizer_name(optimizer: torch.optim.Optimizer) -> str | None:
    """Return the key of an optimizer in `PROJECTED_OPTIMIZERS`; None if it comes from none of the packages."""
    module = type(optimizer).__module__.partition(".")[0]
    return next((name for name, package in PROJECTED_OPTIMIZERS.items() if package.modules[0] == module), None)


def saved_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return one parameter's state as numbers and tensors alone; the state of other optimizers is returned as it is.

    A projector is replaced by its matrix and its seed. The key `seed` is left out, which the optimizer sets on
    construction.
    """
    kept = {key: value for key, value in state.items() if key not in ("projector", "seed")}
    if "projector" in state:
        kept["projection"] = state["projector"].ortho_matrix
        if hasattr(state["projector"], "seed"):
            kept["projection_seed"] = state["projector"].seed
    return kept


def restore_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
    """Load what `saved_state` returned into one parameter's state of a projected optimizer."""
    numbers = {key: int(saved[key]) for key in ("step", "projection_seed") if key in saved}
    state: dict[str, Any] = {key: tensor.to(parameter.device) for key, tensor in saved.items() if key not in numbers}
    state["step"] = numbers["step"]
    if "projection" in state:
        group, name = _group_of(optimizer, parameter), _name_of(optimizer)
        scale_key = PROJECTED_OPTIMIZERS[name].scale_key
        _, projector_class = _classes(name)
        projector = projector_class(
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
    """Layout of what `saved_state` returns for a parameter that a projected optimizer has updated."""
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
    """Import a package and return its optimizer class and its projector class."""
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
    """Return the key of a projected optimizer in `PROJECTED_OPTIMIZERS`."""
    name = projected_optimizer_name(optimizer)
    assert name is not None
    return name


def _group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the parameter group that a parameter is in."""
    groups = optimizer.param_groups
    return next(group for group in groups if any(parameter is member for member in group["params"]))


def _copy_projections(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Copy every new projection into contiguous storage of its own.

    A new projection is a view into the matrix of all singular vectors and would keep min(m, n)² numbers alive instead
    of r · min(m, n). A projection loaded from a checkpoint is contiguous as well, so that products round alike.
    """
    for state in optimizer.state.values():
        if "projector" in state:
            projector = state["projector"]
            matrix = projector.ortho_matrix
            if not matrix.is_contiguous() or matrix.untyped_storage().nbytes() > matrix.nbytes:
                projector.ortho_matrix = matrix.clone(memory_format=torch.contiguous_format)
