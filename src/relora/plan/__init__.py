"""Will it fit, and how long does it take: told from a step that is gone through without memory (`ledger`, `step`)."""

from relora.plan.fit import Candidate as Candidate
from relora.plan.fit import Fit as Fit
from relora.plan.fit import best_fit as best_fit
from relora.plan.step import KINDS as KINDS
from relora.plan.step import StepFigures as StepFigures
from relora.plan.step import StepShape as StepShape
from relora.plan.step import simulate as simulate
