"Temporary: the names of this room where they stood before."
from .core.train import *
from .engine.accelerate import accelerate, pick_precision
from .run.config import RunTrainConfig as TrainConfig
def dpo(policy, ref, dataset, cfg, log=lambda m: None, state=None, cache=None):
    return train_dpo(policy, ref, dataset, cfg, accelerate(cfg.precision, cached=cfg.reference == "cached", cache=cache, state=state), [log])
def train(*args):
    from .run.train import train
    return train(*args)
