"Who takes part, and the environments that they run in"
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

ENVS = {
    "ours": sys.executable,
    "peers": str(ROOT/".venv-peers/bin/python"),
    "vllm": str(ROOT/".venv-vllm/bin/python"),
}


@dataclass(frozen=True)
class Contestant:
    "In words, and the environment of its process"
    words: str
    env: str = "ours"


CONTESTANTS = {
    "ours": Contestant("this project"),
    "lesson": Contestant("the original lesson's way"),
    "trl": Contestant("TRL", "peers"),
    "huggingface": Contestant("transformers' generate", "peers"),
    "vllm": Contestant("vLLM", "vllm"),
    "float32": Contestant("float32"),
    "bfloat16": Contestant("bfloat16"),
    "memory": Contestant("float32, summed"),
    "profile": Contestant("this project"),
    "whole": Contestant("this project"),
    "before": Contestant("this project before it was made fast"),
    "help": Contestant("`wikidpo --help`"),
    "train-help": Contestant("`wikidpo train --help`"),
    "refused": Contestant("a refused `wikidpo train --lr x`"),
    "import": Contestant('`python -c "import wikidpo"`'),
    "load-mine": Contestant("mining that goes on with 95 % scored"),
    "load-filters": Contestant("mining that only has to filter"),
    "load-pairs": Contestant("`PairDataset`"),
    "load-report": Contestant("the report"),
    "load-doctor": Contestant("the doctor"),
    "load-inspector": Contestant("the inspector, of pairs"),
    "load-inspector-samples": Contestant("the inspector, of samples"),
    "load-vote": Contestant("a vote"),
    "import-loss": Contestant('`python -c "import wikidpo.core.loss"`'),
}
