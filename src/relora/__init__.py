"""relora: pretrain and fine-tune language models through low-rank updates.

The public names: `inject`, `restart`, `Schedule` and `merge` work in any PyTorch loop, `Adapters`, `save_adapter` and
`load_adapter` on any model; `pretrain` and `finetune` run a configuration. Each name is imported on its first use, so
that `relora --help` and a misspelt key need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relora.adapters.multi_adapter import Adapters as Adapters
    from relora.adapters.save_load import load_adapter as load_adapter
    from relora.adapters.save_load import save_adapter as save_adapter
    from relora.lowrank import InjectReport as InjectReport
    from relora.lowrank import LowRankConfig as LowRankConfig
    from relora.lowrank import LowRankLinear as LowRankLinear
    from relora.lowrank import RestartConfig as RestartConfig
    from relora.lowrank import RestartReport as RestartReport
    from relora.lowrank import inject as inject
    from relora.lowrank import merge as merge
    from relora.lowrank import restart as restart
    from relora.recipes.finetune import finetune as finetune
    from relora.recipes.pretrain import pretrain as pretrain
    from relora.train.schedule import Schedule as Schedule

__version__: str

_MODULE_OF = {
    "InjectReport": "relora.lowrank",
    "LowRankConfig": "relora.lowrank",
    "LowRankLinear": "relora.lowrank",
    "RestartConfig": "relora.lowrank",
    "RestartReport": "relora.lowrank",
    "inject": "relora.lowrank",
    "merge": "relora.lowrank",
    "restart": "relora.lowrank",
    "Adapters": "relora.adapters.multi_adapter",
    "load_adapter": "relora.adapters.save_load",
    "save_adapter": "relora.adapters.save_load",
    "finetune": "relora.recipes.finetune",
    "pretrain": "relora.recipes.pretrain",
    "Schedule": "relora.train.schedule",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("relora")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'relora' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return [*globals(), "__version__", *_MODULE_OF]
