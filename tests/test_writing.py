"What is written is whole, at once, and nobody's code is run when it is read again"
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from engines import MINI, random_model
from wikidpo.core.files import UserError, read_jsonl
from wikidpo.engine.distributed import load_state, save_state
from wikidpo.engine.reference_cache import cached_table, code_digest, logps_table, weights_digest
from wikidpo.models.adopt import load_model_py
from wikidpo.models.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint, weight_count
from wikidpo.run.folder import JsonlWriter, update_json, write_atomic, write_jsonl

PACKAGE = Path(__file__).parent.parent/"wikidpo"

# ---- files

FULL = '''
import resource, signal, sys
from pathlib import Path
from wikidpo.core.files import UserError
from wikidpo.run.folder import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: write_atomic(Path(sys.argv[1]), "y" * 5000)
except UserError as e: sys.exit(7 if "cannot be written (File too large)" in str(e) else str(e))
'''


def test_a_file_that_no_longer_fits_leaves_the_old_one(tmp_path):
    "A process that may write 1,000 bytes a file and no more, as on a full disk"
    path = tmp_path/"summary.json"
    write_atomic(path, "the old one")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert path.read_text() == "the old one" and [f.name for f in tmp_path.iterdir()] == ["summary.json"]


def test_who_reads_while_a_file_is_replaced_has_the_old_one_to_its_end(tmp_path):
    path = tmp_path/"pairs.jsonl"
    write_atomic(path, "old " * 10_000)
    with open(path) as reader:
        begin = reader.read(40)
        write_atomic(path, b"new")
        assert begin + reader.read() == "old " * 10_000
    assert path.read_text() == "new"


def test_a_folder_is_made_for_a_file(tmp_path):
    write_jsonl(tmp_path/"a"/"b"/"rows.jsonl", [{"text": "Zürich\u2028"}, {}])
    assert (tmp_path/"a"/"b"/"rows.jsonl").read_bytes() == '{"text": "Zürich\u2028"}\n{}\n'.encode()


KILLED = '''
import os, sys
from wikidpo.run.folder import JsonlWriter
writer = JsonlWriter(sys.argv[1])
writer.write({"step": 1})
writer.write([{"step": 2}, {"step": 3}])
os._exit(9)
'''


def test_a_line_is_there_when_write_returns(tmp_path):
    "A process that is gone at once, as by SIGKILL: nothing is written later"
    path = tmp_path/"metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == 9
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("before, kept", [
    ('{"a": 1}\n{"b": ', '{"a": 1}\n'), ('{"a', ""), ("", ""), ('{"a": 1}\n', '{"a": 1}\n')])
def test_a_torn_line_goes_and_the_rest_stays(tmp_path, before, kept):
    path = tmp_path/"samples.jsonl"
    path.write_text(before)
    with JsonlWriter(path) as f: f.write({"text": "ä"})
    assert path.read_text(encoding="utf-8") == kept + '{"text": "ä"}\n'


def test_a_section_of_a_summary_is_set_and_the_others_stay(tmp_path):
    update_json(tmp_path/"summary.json", mine={"pairs": 3})
    whole = update_json(tmp_path/"summary.json", train={"steps": 1})
    assert whole == {"mine": {"pairs": 3}, "train": {"steps": 1}} == json.loads((tmp_path/"summary.json").read_text())
    assert update_json(tmp_path/"summary.json", mine={"pairs": 4})["mine"] == {"pairs": 4}


# ---- what is loaded again

class Payload:
    "Runs a command where somebody unpickles it without care"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def harmless(read, path):
    "Whether reading fails, and the payload in the file has not run"
    with pytest.raises((UserError, pickle.UnpicklingError)): read()
    return not path.exists()


def test_a_state_a_checkpoint_and_a_cache_run_nobody_s_code(tmp_path):
    ran, bad = tmp_path/"ran", tmp_path/"bad.pt"
    torch.save({"model": Payload(ran), "config": {}, "optimizer": {}}, bad)
    torch.load(bad, weights_only=False)
    assert ran.exists(), "the payload works where it is let"
    ran.rmdir()
    model = random_model()
    assert harmless(lambda: load_state(bad, model, torch.optim.AdamW(model.parameters())), ran)
    assert harmless(lambda: load_checkpoint(bad), ran)


def test_a_checkpoint_comes_back_as_it_was_in_both_formats(tmp_path):
    for name in ("m.pt", "m.safetensors"):
        save_checkpoint(tmp_path/name, MINI)
        again = load_checkpoint(tmp_path/name)
        assert again.cfg == MINI.cfg and not again.training
        assert weights_digest(again) == weights_digest(MINI)
        save_checkpoint(tmp_path/name, MINI, torch.bfloat16)
        assert {w.dtype for w in read_checkpoint(tmp_path/name)[0].values()} == {torch.bfloat16}
        small = load_checkpoint(tmp_path/name)
        assert {p.dtype for p in small.parameters()} == {torch.float32}
        wanted = MINI.embed.weight.bfloat16().float()
        assert torch.equal(small.embed.weight, wanted)


def test_weights_that_do_not_fit_and_configs_of_others_are_refused(tmp_path):
    model = random_model()
    state, config = model.state_dict(), asdict(model.cfg)
    for says, model_state, cfg in (
            ("do not fit", state, config | {"n_layer": 1}), ("do not fit", dict(list(state.items())[1:]), config),
            ("does not know .dropout", state, config | {"dropout": .1})):
        torch.save({"model": model_state, "config": cfg}, tmp_path/"m.pt")
        with pytest.raises(UserError, match=says): load_checkpoint(tmp_path/"m.pt")


@pytest.mark.parametrize("shape", [{}, {"tie": False}, {"n_kv_head": 1}, {"n_layer": 3, "ffn_dim": 40}])
def test_the_size_of_a_model_is_known_before_it_is_made(shape):
    model = random_model(**shape)
    assert weight_count(model.cfg) == sum(w.numel() for w in model.state_dict().values())


@pytest.mark.parametrize("claim", [{"n_embd": 2**16}, {"vocab_size": 2**24, "n_embd": 2**14}])
def test_a_config_that_claims_far_more_than_its_weights_takes_no_memory(tmp_path, claim):
    "A model of it would hold 200 GB and more"
    model = random_model()
    torch.save({"model": model.state_dict(), "config": asdict(model.cfg) | claim}, tmp_path/"m.pt")
    with pytest.raises(UserError, match="m.pt: its weights do not fit WikiGPT"): load_checkpoint(tmp_path/"m.pt")


def test_a_checkpoint_is_opened_without_the_compiler():
    "PyTorch's, which takes longer to import than the file to read"
    opens = "import sys; from wikidpo.models.checkpoints import load_checkpoint; load_checkpoint(sys.argv[1]); "
    code, file = opens + "print('torch._dynamo' in sys.modules)", PACKAGE/"data"/"miniwiki"/"model.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_saved_state_is_the_run_as_it_was(tmp_path):
    a, b = random_model(), random_model(n_kv_head=4)
    opts = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (a, b)]
    a(torch.zeros(1, 5, dtype=torch.long))[0].sum().backward()
    opts[0].step()
    save_state(tmp_path/"state.pt", a, opts[0], history=[{"step": 1}])
    assert load_state(tmp_path/"state.pt", b, opts[1]) == {"history": [{"step": 1}]}
    assert weights_digest(a) == weights_digest(b)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        moments = [opt.state[w]["exp_avg"] for opt, w in zip(opts, (p, q))]
        assert torch.equal(*moments) and moments[1].abs().sum() > 0


# ---- the reference's table

def test_a_table_is_made_once_for_each_key_and_kept(tmp_path):
    asked = []

    def make():
        asked.append(1)
        return torch.full((2, 2), float(len(asked)))

    first = cached_table(make, ["pairs", 1], tmp_path)
    assert torch.equal(cached_table(make, ["pairs", 1], tmp_path), first) and len(asked) == 1
    assert cached_table(make, ["pairs", 2], tmp_path)[0, 0] == 2
    before = len(list(tmp_path.iterdir()))
    cached_table(make, ["pairs", 1], None)
    assert len(asked) == 3 and len(list(tmp_path.iterdir())) == before


TWO_STEPS = """
import copy, json, sys
from pathlib import Path
import wikidpo
from wikidpo.core.chat import load_tokenizer
from wikidpo.core.config import TrainConfig
from wikidpo.core.data import PairDataset
from wikidpo.core.train import freeze, train_dpo
from wikidpo.engine.scoring import TrainingParts
from wikidpo.engine.training import TrainingEngine
from wikidpo.models.checkpoints import load_checkpoint
from wikidpo.world.facts import DATA
policy = load_checkpoint(DATA/"model.safetensors")
data = PairDataset(sys.argv[1], load_tokenizer(DATA/"tokenizer.json"), 256)
engine = TrainingEngine(lambda policy, tokens: TrainingParts(), cache=Path(sys.argv[2]))
cfg = TrainConfig(batch_size=4, grad_accum_steps=1)
history = train_dpo(policy, freeze(copy.deepcopy(policy)), data, cfg, engine)
print(json.dumps([wikidpo.__file__, history[0]["reward/margin"], history[0]["loss"]]))
"""


def test_a_changed_scorer_does_not_read_what_another_wrote(tmp_path):
    "A copy of the package, whose log-probabilities become twice as large between two runs with one cache"
    package, pairs, cache = tmp_path/"wikidpo", tmp_path/"pairs.jsonl", tmp_path/"cache"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("data", "__pycache__"))
    (package/"data").symlink_to(PACKAGE/"data")
    write_jsonl(pairs, read_jsonl(PACKAGE/"data"/"miniwiki"/"pairs.jsonl")[:8])
    def run():
        done = subprocess.run([sys.executable, "-c", TWO_STEPS, str(pairs), str(cache)], capture_output=True, text=True,
                              cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        where, *numbers = json.loads(done.stdout)
        assert where == str(package/"__init__.py")
        return numbers
    assert run() == [0, pytest.approx(math.log(2), abs=1e-6)] and len(list(cache.iterdir())) == 1
    scorer = package/"engine"/"shared_prompt.py"
    code = scorer.read_text()
    scorer.write_text(code.replace("chosen, rejected = sums.chunk(2)", "chosen, rejected = (2 * sums).chunk(2)"))
    assert scorer.read_text() != code
    assert run() == [0, pytest.approx(math.log(2), abs=1e-6)] and len(list(cache.iterdir())) == 2


SQUARE = "class Square(torch.nn.Module):\n    def forward(self, x): return x * x\n"
MODEL_PY = ("import torch\nfrom square import Square\nclass GPTConfig: pass\nclass GPT(torch.nn.Module):\n"
            "    def __init__(self):\n        super().__init__()\n        self.square = Square()\n"
            "    def forward(self, ids): return self.square(ids)\n")


@pytest.mark.parametrize("name", ["model.py", "square.py"])
def test_a_learner_s_changed_model_py_is_another_reference(tmp_path, name):
    def digest():
        (tmp_path/"model.py").write_text(MODEL_PY)
        (tmp_path/"square.py").write_text("import torch\n" + SQUARE)
        return code_digest(load_model_py(tmp_path/"model.py").GPT())
    before = digest()
    assert digest() == before != code_digest(MINI)
    model = load_model_py(tmp_path/"model.py").GPT()
    (tmp_path/name).write_text((tmp_path/name).read_text() + "# changed\n")
    assert code_digest(model) != before


def test_a_table_holds_each_pair_in_its_own_place():
    class Numbered:
        def __len__(self): return 5
        def __getitem__(self, i): return ([i], [1]), ([i + 10], [1])

    def ask(batch): return batch.chosen_ids[:, 0].float(), batch.rejected_ids[:, 0].float()
    table = logps_table(ask, Numbered(), [[3, 0], [4]])
    assert table.tolist() == [[0, 10], [0, 0], [0, 0], [3, 13], [4, 14]]


def test_the_digest_sees_names_shapes_types_and_bits():
    def digest(**weights):
        class Weights:
            def state_dict(self): return weights
        return weights_digest(Weights())

    w = torch.arange(6.)
    others = [digest(a=w), digest(b=w), digest(a=w.view(2, 3)), digest(a=w.view(torch.int32)), digest(a=w + 1e-6),
              digest(a=w, b=w)]
    assert len(set(others)) == 6 and digest(a=w.clone()) == others[0]


def test_a_line_that_the_system_takes_in_parts_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    with JsonlWriter(tmp_path/"x.jsonl") as f: f.write({"text": "x" * 99})
    assert read_jsonl(tmp_path/"x.jsonl") == [{"text": "x" * 99}]
