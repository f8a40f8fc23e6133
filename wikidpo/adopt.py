"Temporary: the names of this room where they stood before. The lead removes it."
from .models.adopt import *
from .models.adopt import SkipInit, build_gpt, find_layers, group_readings, guess_settings, load_learner_weights
from .models.adopt import checked_call, context_length, error_line, logit_gap, search_reading, split_per_head, trial_logits

Bare, alike, build, context, fill, gap = SkipInit, group_readings, build_gpt, context_length, load_learner_weights, logit_gap
guesses, per_head, search, structure, trial = guess_settings, split_per_head, search_reading, find_layers, trial_logits
_call, _why = checked_call, error_line
