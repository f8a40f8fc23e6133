from ..loss import *
