from . import certification as certification
from . import report as report
from . import transitions as transitions
from .transitions import transition as transition
