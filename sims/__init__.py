"""Many cheap worlds: data sets, training, sweeps, measures over sweeps, and the results store.

``sweep(Spec(...))`` trains a network for every combination of a spec's axes and returns one labeled array; ``python -m
sims`` does the same from the command line and resumes what was cut.
"""

from sims.store.run import load as load
from sims.study.transitions import transition as transition
from sims.sweeps.engine import sweep as sweep
from sims.sweeps.spec import Spec as Spec
