"Temporary: the names of this room where they stood before. The lead removes it."
from .judge.client import *
from .judge.client import ASK_LOGPROBS as SHOW, server_words as _words
from .judge.config import *
from .judge.offline import *
from .judge.offline import SCORE_SPREAD as SPREAD, listening_socket as _bind
from .judge.pool import *
from .judge.prompts import *
from .judge.prompts import SCORE_LABELS as LABELS, VERDICT_LABELS as VERDICTS
from .judge.vllm import *
