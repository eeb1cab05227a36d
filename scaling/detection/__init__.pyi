from . import evaluation as evaluation
from .evaluation import auroc as auroc
