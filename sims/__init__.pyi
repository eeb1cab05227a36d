__version__: str

from . import data as data
from . import flags as flags
from . import interrupts as interrupts
from . import presets as presets
from . import store as store
from . import study as study
from . import sweeps as sweeps
from . import terminal as terminal
from .store import load as load
from .study import ask as ask
from .study import transition as transition
from .sweeps import Spec as Spec
from .sweeps import sweep as sweep
