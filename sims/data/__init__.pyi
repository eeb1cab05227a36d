from . import datasets as datasets
from . import duplicates as duplicates
from . import formats as formats
from . import readers as readers
from .datasets import Dataset as Dataset
