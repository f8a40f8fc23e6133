"Temporary: the names of this room where they stood before. The lead removes it."
from .world.exercises.all import EXERCISES
from .world.exercises.base import *
from .world.exercises.lesson00 import *
from .world.exercises.lesson01 import *
from .world.exercises.lesson02 import *
from .world.exercises.lesson03 import *
from .world.exercises.lesson04 import *
from .world.exercises.lesson05 import *
from .world.exercises.lesson06 import *
from .world.exercises.lesson07 import *
from .world.exercises.lesson08 import *
from .world.exercises.lesson09 import *
from .world.exercises.lesson10 import *
