"Temporary: the names of this room where they stood before. The lead removes it."
from .core.rlhf import *
from .core.rlhf import reward_score as score
