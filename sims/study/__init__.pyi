from . import certification as certification
from . import report as report
from . import tables as tables
from . import transitions as transitions
from .transitions import transition as transition
