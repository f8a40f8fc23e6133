"Temporary: the names of this room where they stood before. The lead removes it."
from .core.config import TEMPS, UNIT
from .core.pairs import *
from .run.config import MineConfig, PublishConfig
from .run.mine import *
from .run.publish import *
from .run.publish import CARD_MARK as CARD, SIZE_CATEGORIES as SIZES
