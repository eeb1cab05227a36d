from . import asking as asking
from . import certification as certification
from . import report as report
from . import tables as tables
from . import transitions as transitions
from .asking import ask as ask
from .transitions import transition as transition
