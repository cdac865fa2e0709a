"""relora: pretrain and fine-tune language models through low-rank updates.

The library face: `inject`, `restart`, `Schedule`, `merge` work in any PyTorch loop; `pretrain` runs a whole
configuration.
"""

from importlib.metadata import version

from relora.lowrank import InjectReport as InjectReport
from relora.lowrank import LowRankConfig as LowRankConfig
from relora.lowrank import LowRankLinear as LowRankLinear
from relora.lowrank import RestartReport as RestartReport
from relora.lowrank import inject as inject
from relora.lowrank import merge as merge
from relora.lowrank import restart as restart
from relora.train.schedule import Schedule as Schedule

__version__ = version("relora")
