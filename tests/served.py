"The shipped MiniWiki policy behind a real vLLM, as `make teacher` installs it: what the tests marked vllm talk to"
import json
from contextlib import contextmanager
from pathlib import Path

from wikidpo.judge.config import VllmConfig
from wikidpo.judge.vllm import Vllm
from wikidpo.models.hf import export
from wikidpo.world.facts import DATA

# a judging prompt has about 300 of MiniWiki's tokens, its own context is 256; RoPE goes on, and a test needs no sense
CONTEXT = 1024
# no compiling, a cache that fits anywhere, and the probability of every token
FLAGS = "--enforce-eager --kv-cache-memory-bytes 256M --max-logprobs 2048"

def export_served(folder)->Path:
    "MiniWiki as a Hugging Face folder with a longer context, its heads widened to 64, for which vLLM has CPU code"
    export(DATA/"model.safetensors", DATA/"tokenizer.json", folder, head_dim=64)
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        path = Path(folder)/name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: CONTEXT}))
    return Path(folder)

@contextmanager
def served(folder, key=None, **settings):
    "Export MiniWiki into `folder` and serve it while the block runs; yields a `Vllm` with its url and cfg.serve_model"
    with serving_model(export_served(folder), key, **settings) as server: yield server

@contextmanager
def serving_model(folder, key=None, **settings):
    "Serve a Hugging Face folder while the block runs"
    ours = dict(serve_model=str(folder), port=0, dtype="float32", max_model_len=CONTEXT,
                gpu_memory_utilization=.1, flags=FLAGS)
    with Vllm(VllmConfig(**ours | settings), key) as server: yield server
