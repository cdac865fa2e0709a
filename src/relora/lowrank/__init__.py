"""Low-rank layers for any `nn.Module`: injection, the layer, merge and restart.

To read how ReLoRA works (arXiv 2307.05695), start with `linear` (the layer) and `restart` (what happens between two
cycles). `inject` puts the layers into a model, `config` has their settings, `kernel` and `costs` compute them fast, and
`storage/` keeps the frozen weights.
"""

from relora.lowrank.config import LowRankConfig as LowRankConfig
from relora.lowrank.inject import InjectReport as InjectReport
from relora.lowrank.inject import exact_tensors as exact_tensors
from relora.lowrank.inject import inject as inject
from relora.lowrank.inject import load_exact_tensors as load_exact_tensors
from relora.lowrank.inject import low_rank_layers as low_rank_layers
from relora.lowrank.inject import merge as merge
from relora.lowrank.inject import strip as strip
from relora.lowrank.linear import LowRankLinear as LowRankLinear
from relora.lowrank.restart import RestartConfig as RestartConfig
from relora.lowrank.restart import RestartReport as RestartReport
from relora.lowrank.restart import restart as restart
