"`wikidpo publish` with a real mining, a real git clone and a real remote"
import shutil, subprocess
import pytest, yaml
from wikidpo.cli import main
from wikidpo.files import UserError, read_jsonl
from wikidpo.pairs import PublishConfig, dataset_card, publish

@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    out = tmp_path_factory.mktemp("mined")/"run"
    main(["mine", "--n-prompts", "48", "--out", str(out)])
    return out

def git(where, *words): return subprocess.run(["git", "-C", str(where), *words], check=True, capture_output=True, text=True).stdout.strip()

@pytest.fixture
def clone(tmp_path):
    "A clone with one commit in it, of a bare repository beside it"
    subprocess.run(["git", "init", "-q", "--bare", tmp_path/"remote.git"], check=True)
    subprocess.run(["git", "clone", "-q", tmp_path/"remote.git", tmp_path/"clone"], check=True, capture_output=True)
    for k, v in (("user.name", "me"), ("user.email", "me@example.org")): git(tmp_path/"clone", "config", k, v)
    (tmp_path/"clone"/"README.md").write_text("My data\n")
    git(tmp_path/"clone", "add", "-A"); git(tmp_path/"clone", "commit", "-qm", "first"); git(tmp_path/"clone", "push", "-q", "origin", "HEAD")
    return tmp_path/"clone"

def test_the_dry_run_touches_nothing_and_shows_all(mined, clone, capsys):
    main(["publish", str(clone), "--out", str(mined)])
    said = capsys.readouterr().out
    assert said.startswith("Nothing was touched.") and "git commit: DPO preference pairs: " in said and "Choose a licence first" in said and "## What the judge was asked" in said
    assert git(clone, "status", "--porcelain") == "" and git(clone, "rev-list", "--count", "HEAD") == "1"

def test_push_arrives_and_only_the_two_files_are_committed(mined, clone, capsys):
    (clone/"notes.txt").write_text("mine, not yet committed"); git(clone, "add", "notes.txt")
    main(["publish", str(clone), "--out", str(mined), "--license", "cc-by-4.0", "--push"])
    assert git(clone, "ls-tree", "-r", "--name-only", "HEAD").split("\n") == ["README.md", "pref/README.md", "pref/pairs.jsonl"]
    assert git(clone.parent/"remote.git", "rev-parse", git(clone, "branch", "--show-current")) == git(clone, "rev-parse", "HEAD")
    assert (clone/"pref"/"pairs.jsonl").read_bytes() == (mined/"pairs.jsonl").read_bytes() and (clone/"README.md").read_text() == "My data\n"
    main(["publish", str(clone), "--out", str(mined), "--license", "cc-by-4.0", "--push"])
    assert "nothing new to commit" in capsys.readouterr().out and git(clone, "rev-list", "--count", "HEAD") == "2"

def test_the_card_says_where_the_pairs_come_from(mined):
    card, pairs = dataset_card(mined, "mit"), read_jsonl(mined/"pairs.jsonl")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "mit" and head["size_categories"] == ["n<1K"] and head["configs"][0]["data_files"] == "pairs.jsonl"
    for words in (f"{len(pairs):,} pairs from 48 prompts", "`miniwiki-teacher`", "best minus worst at least 2, best at least 6", "0.7, 0.9, 1.1, 1.3", "<|user|>\n{prompt}\n<|end|>\n<|assistant|>\n", "| licence | mit |"): assert words in card, words
    assert all(f"`{column}`" in card for column in pairs[0])
    assert str(mined) not in card
    for path in ("checkpoint", "tokenizer"): assert str(yaml.safe_load((mined/"config.yaml").read_text())["mine"]["policy"][path]) not in card

def test_refusals_are_one_line_and_write_nothing(mined, clone, tmp_path):
    def no(says, out=mined, **kw):
        with pytest.raises(UserError, match=says) as e: publish(out, PublishConfig(**({"repo": str(clone), "license": "mit", "commit": True} | kw)))
        assert "\n" not in str(e.value) and git(clone, "status", "--porcelain") == ""
    no("say under which licence", license=None)
    no("not the top of a git repository", repo=str(tmp_path))
    (clone/"inside").mkdir(); no("not the top of a git repository", repo=str(clone/"inside"))       # its commit would land in the repository around it
    no("README.md: is there already and is no card of wikidpo", folder=".")
    shard = tmp_path/"shard"; shutil.copytree(mined, shard)
    (shard/"config.yaml").write_text((shard/"config.yaml").read_text().replace("shard: null", "shard: 1/2")); no("is shard 1/2 of a mining", out=shard)
    (shard/"config.yaml").write_text((mined/"config.yaml").read_text()); (shard/"pairs.jsonl").write_text(""); no("holds no pairs", out=shard)
    (shard/"config.yaml").write_text((mined/"config.yaml").read_text().replace("model.safetensors", "gone.safetensors")); (shard/"pairs.jsonl").write_bytes((mined/"pairs.jsonl").read_bytes()); no("no such checkpoint any more", out=shard)
    no("holds no finished mining", out=tmp_path)
    no("lies outside of", folder="../elsewhere")
    git(clone, "remote", "set-url", "origin", str(tmp_path/"gone.git"))
    with pytest.raises(UserError, match="git push: fatal: .*gone.git"): publish(mined, PublishConfig(str(clone), license="mit", push=True))
    assert git(clone, "rev-list", "--count", "HEAD") == "2"                       # committed; the same command pushes later
