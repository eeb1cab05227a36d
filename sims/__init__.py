"""Many cheap worlds: data sets, training, sweeps, measures over sweeps, and the results store.

``sweep(Spec(...))`` trains a network for every combination of a spec's axes and returns one labeled array; ``python -m
sims`` does the same from the command line and resumes what was cut.
"""

from sims.engine import sweep as sweep
from sims.spec import Spec as Spec
from sims.store import load as load
from sims.transitions import transition as transition
