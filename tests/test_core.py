"Core is a complete DPO by itself, and the only one"
import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent/"wikidpo"

ALONE = '''
import json, sys
from itertools import islice
from pathlib import Path
from safetensors import safe_open
from wikidpo.core.chat import load_tokenizer
from wikidpo.core.config import TrainConfig
from wikidpo.core.data import PairDataset
from wikidpo.core.model import GPT, GPTConfig
from wikidpo.core.sample import sample_k
from wikidpo.core.train import freeze, train_dpo

shipped, folder = Path(sys.argv[1]), Path(sys.argv[2])
with safe_open(shipped/"model.safetensors", "pt") as f:
    policy = GPT(GPTConfig(**json.loads(f.metadata()["config"])))
    policy.load_state_dict({name: f.get_tensor(name) for name in f.keys()})
policy.float()
with open(shipped/"pairs.jsonl", encoding="utf-8") as f:
    (folder/"64.jsonl").write_text("".join(islice(f, 64)), encoding="utf-8")
tok = load_tokenizer(shipped/"tokenizer.json")
dataset = PairDataset(folder/"64.jsonl", tok, 256)
cfg = TrainConfig(lr=3e-4, batch_size=16, grad_accum_steps=1, warmup_steps=1, epochs=2)
history = train_dpo(policy, freeze(policy), dataset, cfg)
answer, = sample_k(policy, tok, ["What is the capital of Peru?"], temps=(0,), max_new=32)[0]
others = [name for name in sys.modules if name.startswith("wikidpo.") and not name.startswith("wikidpo.core")]
print(json.dumps({"history": history, "answer": answer.text, "others": others}))
'''


def test_core_alone_trains_the_shipped_policy_on_64_pairs(tmp_path):
    assert ALONE.count("\n") < 40
    command = [sys.executable, "-c", ALONE, str(PACKAGE/"data"/"miniwiki"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    history = found["history"]
    assert found["others"] == []
    assert len(history) == 8 and history[0]["reward/margin"] == 0
    assert abs(history[0]["loss"] - math.log(2)) < 1e-6
    assert history[-1]["loss"] < .6 and history[-1]["reward/accuracy"] > .9
    assert "Lima" in found["answer"]


def test_the_loss_needs_torch_and_nothing_else():
    "What importing it adds to torch's own import, in a fresh process"
    code = "import sys, torch; before = {*sys.modules}; import wikidpo.core.loss; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = {name.split(".")[0] for name in done.stdout.split()}
    assert added - set(sys.stdlib_module_names) == {"wikidpo"}


def modules(folder="."):
    return sorted(p for p in (PACKAGE/folder).rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def test_core_imports_only_core():
    for path in modules("core"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level: continue
            assert node.level == 1, f"{path.name}: from {'.' * node.level}{node.module}"


def called(node):
    "Names that a function calls, as `f(...)` or `x.f(...)`"
    calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
    return {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", None) for f in calls}


def code_of(path):
    "The Python of a file, or of all cells of a notebook"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py": return text
    cells = ("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join(cells), flags=re.M)


def trains_on_preferences(path):
    "Whether a file has -log sigmoid of something, or a loss made of it, and sends gradients back"
    names = called(ast.parse(code_of(path)))
    losses = {"logsigmoid", "preference_loss", "dpo_loss", "pair_loss", "kto_loss"}
    return bool(losses & names) and "backward" in names


# What takes the gradient of a preference loss without being the loop, and why
OTHERS = {
    "benchmarks/lesson.py",                    # the original lesson's own loop, against which the package is timed
    "nbs/lessons/01_why_not_rlhf.ipynb",       # its reward model; a step of PPO
    "wikidpo/core/rlhf.py",                    # the same, exported
    "nbs/appendix/ppo.ipynb",                  # PPO in full
    "nbs/lessons/02_the_loss.ipynb",           # the gradient of one pair, and of numbers
    "nbs/lessons/14_the_family.ipynb",         # KTO's step, handed to the loop
    "wikidpo/core/kto.py",                     # the same, exported
    "nbs/appendix/trap_museum.ipynb",          # the gradient of one step, scaled rightly and wrongly
    "nbs/engine/speed_training.ipynb",         # one step, in a dozen ways
    "nbs/lessons/10_trl.ipynb",                # the gradient of one step, beside TRL's
}


def test_there_is_one_loop():
    "Only `core.train` turns the loss of preferences into steps; everybody else calls `train_dpo`"
    root = PACKAGE.parent
    files = [p for room in ("wikidpo", "benchmarks", "tools", "nbs") for p in (root/room).rglob("*.*")
             if p.suffix in (".py", ".ipynb") and p.name != "_modidx.py" and ".ipynb_checkpoints" not in p.parts]
    found = {p.relative_to(root).as_posix() for p in files if trains_on_preferences(p)}
    assert found - OTHERS == {"wikidpo/core/train.py", "nbs/lessons/06_training.ipynb"}
    assert found >= OTHERS
    assert "train_dpo" in called(ast.parse(code_of(PACKAGE/"run"/"train.py")))


@pytest.mark.parametrize("folder, names", [
    ("tools", ["rlhf_run.py"]), ("benchmarks", ["inside.py"]), ("nbs/appendix", ["trap_museum.ipynb"])])
def test_the_others_run_the_same_loop(folder, names):
    for name in names:
        text = (PACKAGE.parent/folder/name).read_text(encoding="utf-8")
        assert "train_dpo" in text or "accumulate(" in text, f"{folder}/{name}"


def test_the_model_carries_no_switches():
    "Core knows nothing of devices, compilers, processes, servers, folders and progress bars"
    forbidden = ("cuda", "compile", "distributed", "mkldnn", "avx", "tqdm", "openai", "httpx", "wandb", "pin_memory")
    for path in modules("core"):
        code = ast.parse(path.read_text(encoding="utf-8"))
        words = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)}
        words |= {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute)}
        found = [w for w in words for bad in forbidden if bad in w.lower() and w != "compile"]
        if path.name == "rlhf.py": found = [w for w in found if "memory" not in w]
        assert not found, f"{path.name}: {found}"

