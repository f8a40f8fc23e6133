"Temporary: the names of this room where they stood before. The lead removes it."
from .world.facts import *
from .world.answers import *
from .world.grade import *
