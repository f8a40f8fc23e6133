"Temporary: the names of this room where they stood before. The lead removes it."
from .show.beta import *
from .show.beta import pull as weight
from .show.inspector import *
from .show.inspector import PAIR_FIELDS as FIELDS, PAIRS_A_PAGE as PAGE
from .show.player import *
from .show.tokens import *
from .show.vote import *
from .show.vote import OUTCOMES as VERDICTS
from .show.widgets import *
