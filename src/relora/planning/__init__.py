"""Will it fit, and how long does it take: told from a step that is gone through without memory (`ledger`, `step`)."""

from relora.planning.fit import Candidate as Candidate
from relora.planning.fit import Fit as Fit
from relora.planning.fit import best_fit as best_fit
from relora.planning.step import KINDS as KINDS
from relora.planning.step import StepFigures as StepFigures
from relora.planning.step import StepShape as StepShape
from relora.planning.step import simulate as simulate
