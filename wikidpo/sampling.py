"Temporary: the names of this room where they stood before."
from .core.config import TEMPS, UNIT
from .core.data import pad_right
from .core.sample import *
from .engine.accelerate import is_large as large, pick_device, pick_precision, ready_to_sample as sampler
from .engine.ragged import *
from .run.config import PolicyConfig
def open_policy(*args):
    from .models.policy import open_policy
    return open_policy(*args)
