"Temporary: the names of this room where they stood before."
from .core.model import *
from .core.model import causal
from .models.checkpoints import *
