"`wikidpo publish` with a real mining, a real git clone and a real remote"
import json, shutil, subprocess

import pytest, yaml

from wikidpo.cli import main
from wikidpo.core.files import UserError, read_jsonl
from wikidpo.run.config import PublishConfig
from wikidpo.run.publish import dataset_card, publish

@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    out = tmp_path_factory.mktemp("mined")/"run"
    main(["mine", "--n-prompts", "48", "--out", str(out)])
    return out

def git(where, *words):
    return subprocess.run(["git", "-C", str(where), *words], check=True, capture_output=True, text=True).stdout.strip()

def commits(where): return int(git(where, "rev-list", "--count", "HEAD"))

def command(clone, out, *flags): main(["publish", str(clone), "--out", str(out), *flags])

@pytest.fixture
def clone(tmp_path):
    "A clone with one commit in it, of a bare repository beside it"
    remote, clone = tmp_path/"remote.git", tmp_path/"clone"
    subprocess.run(["git", "init", "-q", "--bare", remote], check=True)
    subprocess.run(["git", "clone", "-q", remote, clone], check=True, capture_output=True)
    git(clone, "config", "user.name", "me")
    git(clone, "config", "user.email", "me@example.org")
    (clone/"README.md").write_text("My data\n")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "first")
    git(clone, "push", "-q", "origin", "HEAD")
    return clone

def test_the_dry_run_touches_nothing_and_shows_all(mined, clone, capsys):
    command(clone, mined)
    printed = capsys.readouterr().out
    assert printed.startswith("Nothing was touched.") and "git commit: DPO preference pairs: " in printed
    assert "Choose a licence first" in printed and "## What the judge was asked" in printed
    assert git(clone, "status", "--porcelain") == "" and commits(clone) == 1

def test_push_arrives_and_only_the_two_files_are_committed(mined, clone, capsys):
    (clone/"notes.txt").write_text("mine, not yet committed")
    git(clone, "add", "notes.txt")
    command(clone, mined, "--license", "cc-by-4.0", "--push")
    names = git(clone, "ls-tree", "-r", "--name-only", "HEAD").split("\n")
    assert names == ["README.md", "pref/README.md", "pref/pairs.jsonl"]
    branch = git(clone, "branch", "--show-current")
    assert git(clone.parent/"remote.git", "rev-parse", branch) == git(clone, "rev-parse", "HEAD")
    assert (clone/"pref"/"pairs.jsonl").read_bytes() == (mined/"pairs.jsonl").read_bytes()
    assert (clone/"README.md").read_text() == "My data\n"
    command(clone, mined, "--license", "cc-by-4.0", "--push")
    assert "nothing new to commit" in capsys.readouterr().out and commits(clone) == 2

def test_the_card_says_where_the_pairs_come_from(mined):
    card, pairs = dataset_card(mined, "mit"), read_jsonl(mined/"pairs.jsonl")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "mit" and head["size_categories"] == ["n<1K"]
    assert head["configs"][0]["data_files"] == "pairs.jsonl"
    for words in (f"{len(pairs):,} pairs from 48 prompts", "`miniwiki-teacher`",
                  "best minus worst at least 2, best at least 6", "0.7, 0.9, 1.1, 1.3",
                  "<|user|>\n{prompt}\n<|end|>\n<|assistant|>\n", "| licence | mit |"):
        assert words in card, words
    assert all(f"`{column}`" in card for column in pairs[0])
    policy = yaml.safe_load((mined/"config.yaml").read_text())["mine"]["policy"]
    for path in (str(mined), policy["checkpoint"], policy["tokenizer"]): assert path not in card

def no(clone, out, says, **options):
    "Publishing is refused in one line, and writes nothing"
    settings = {"repo": str(clone), "license": "mit", "commit": True} | options
    with pytest.raises(UserError, match=says) as e: publish(out, PublishConfig(**settings))
    assert "\n" not in str(e.value) and git(clone, "status", "--porcelain") == ""

def test_refusals_are_one_line_and_write_nothing(mined, clone, tmp_path):
    no(clone, mined, "say under which licence", license=None)
    no(clone, mined, "not the top of a git repository", repo=str(tmp_path))
    (clone/"inside").mkdir() # its commit would land in the repository around it
    no(clone, mined, "not the top of a git repository", repo=str(clone/"inside"))
    no(clone, mined, "README.md: is there already and is no card of wikidpo", folder=".")
    no(clone, mined, "lies outside of", folder="../elsewhere")
    no(clone, tmp_path, "holds no finished mining")

def test_a_mining_that_is_no_whole_is_refused(mined, clone, tmp_path):
    out = shutil.copytree(mined, tmp_path/"copy")
    config, pairs = (out/"config.yaml").read_text(), (out/"pairs.jsonl").read_bytes()
    (out/"config.yaml").write_text(config.replace("shard: null", "shard: 1/2"))
    no(clone, out, "is shard 1/2 of a mining")
    (out/"config.yaml").write_text(config)
    (out/"pairs.jsonl").write_text("")
    no(clone, out, "holds no pairs")
    (out/"config.yaml").write_text(config.replace("model.safetensors", "gone.safetensors"))
    (out/"pairs.jsonl").write_bytes(pairs)
    no(clone, out, "no such checkpoint any more")

def test_pairs_that_plain_git_does_not_take_are_refused(mined, clone, tmp_path):
    "Many hosts refuse a file of 100 MB when it is pushed: too late, it is in the history by then"
    out = shutil.copytree(mined, tmp_path/"copy")
    lines = (out/"pairs.jsonl").read_text().splitlines()
    spaces = " " * (96_000_000//len(lines))
    (out/"pairs.jsonl").write_text("".join(f"{line}{spaces}\n" for line in lines))
    no(clone, out, "96 MB are too much for plain git .* use git-lfs, or publish a part")


def test_a_push_that_fails_leaves_the_commit(mined, clone, tmp_path):
    git(clone, "remote", "set-url", "origin", str(tmp_path/"gone.git"))
    with pytest.raises(UserError, match="git push: fatal: .*gone.git"):
        publish(mined, PublishConfig(str(clone), license="mit", push=True))
    assert commits(clone) == 2 # the same command pushes later


@pytest.mark.parametrize("folder", [
    ".git", ".git/hooks", "data/.git/x", ".GIT/hooks", "pref/../.git", "/tmp", "..", "a\x1bb"])
def test_folders_that_are_no_place_for_data(mined, clone, folder):
    before = sorted(str(p) for p in (clone/".git").rglob("*"))
    no(clone, mined, "publish.folder: ", folder=folder)
    assert sorted(str(p) for p in (clone/".git").rglob("*")) == before


def test_links_are_not_followed(mined, clone, tmp_path):
    "Neither in the clone nor in the run folder"
    (tmp_path/"outside").mkdir()
    (tmp_path/"private").write_text("private")
    (clone/"away").symlink_to(tmp_path/"outside")
    (clone/"pref").mkdir()
    (clone/"pref/pairs.jsonl").symlink_to(tmp_path/"private")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "links")
    no(clone, mined, "away: a link is in the way", folder="away")
    no(clone, mined, "away: a link is in the way|away/deeper: a link is in the way", folder="away/deeper")
    no(clone, mined, "pairs.jsonl: a link is in the way")
    out = shutil.copytree(mined, tmp_path/"copy")
    (out/"pairs.jsonl").unlink()
    (out/"pairs.jsonl").symlink_to(mined/"pairs.jsonl")
    no(clone, out, "pairs.jsonl: is a link", folder="other")
    assert not list((tmp_path/"outside").iterdir()) and (tmp_path/"private").read_text() == "private"


def changed_config(mined, out, change):
    "A copy of the run with something else in the section of its mining"
    shutil.copytree(mined, out)
    config = yaml.safe_load((out/"config.yaml").read_text())
    change(config["mine"])
    (out/"config.yaml").write_text(yaml.safe_dump(config))
    return out


def test_no_hash_of_what_a_strangers_configuration_names(mined, clone, tmp_path, monkeypatch):
    "Only of a checkpoint, and only where a run's checkpoint lies"
    monkeypatch.chdir(clone)
    real = yaml.safe_load((mined/"config.yaml").read_text())["mine"]["policy"]["checkpoint"]
    assert ", SHA-256 when published `" in dataset_card(mined)
    shutil.copy(real, tmp_path/"other.safetensors")
    (clone/"id_rsa").write_text("secret")
    for i, path in enumerate([tmp_path/"other.safetensors", clone/"id_rsa"]):
        out = changed_config(mined, tmp_path/str(i), lambda c, path=path: c["policy"].update(checkpoint=str(path)))
        card = dataset_card(out)
        assert f"`{path.name}` |" in card and "SHA-256" not in card


def test_names_in_the_card_stay_names(mined, tmp_path):
    "Backticks, bars, markup, line breaks and control characters in what a run calls its files and its judge"
    odd = "a|b`c`<script>alert(1)</script>\n| x | y |\x1b[31m](http://x).jsonl"
    def change(c):
        c["prompts"] = f"/tmp/{odd}"
        c["teacher"]["model"] = odd + "x" * 5000
    card = dataset_card(changed_config(mined, tmp_path/"run", change), "mit")
    table = [line for line in card.split("\n") if line.startswith("| ")]
    assert len(table) == len([line for line in dataset_card(mined, "mit").split("\n") if line.startswith("| ")])
    assert "\x1b" not in card and "`c`" not in card and len(card) < 20_000
    assert all(line.replace("\\|", "").count("|") == 3 and line.count("`") % 2 == 0 for line in table)


@pytest.mark.parametrize("change", [
    lambda c: c.update(top_k="[x](http://x)"), lambda c: c.update(temps=["hot"]), lambda c: c.update(gap=None),
    lambda c: c.update(teacher=3), lambda c: c["policy"].pop("tokenizer"),
    lambda c: c["policy"].update(checkpoint=[1])])
def test_configurations_that_say_too_little_for_a_card(mined, clone, tmp_path, change):
    out = changed_config(mined, tmp_path/"run", change)
    with pytest.raises(UserError) as e: publish(out, PublishConfig(str(clone), license="mit", commit=True))
    assert "\n" not in str(e.value) and commits(clone) == 1


@pytest.mark.parametrize("license", ["", "a b", "mit\nx: y", "x" * 100, "<b>"])
def test_odd_licences(mined, clone, license): no(clone, mined, "publish.license", license=license)


def test_nothing_is_pushed_without_the_flag_and_no_token_is_shown(mined, clone, tmp_path):
    before = git(tmp_path/"remote.git", "for-each-ref")
    publish(mined, PublishConfig(str(clone), license="mit", commit=True))
    assert git(tmp_path/"remote.git", "for-each-ref") == before
    token = "ghp_" + "planted0" * 5                                    # made up
    git(clone, "remote", "set-url", "origin", f"https://{token}:x-oauth-basic@127.0.0.1:9/me/data.git")
    with pytest.raises(UserError, match="git push: fatal") as e:
        publish(mined, PublishConfig(str(clone), license="mit", push=True))
    assert token not in str(e.value)


def test_a_half_written_file_of_a_killed_publishing_goes(mined, clone):
    (clone/"pref").mkdir()
    (clone/"pref/.pairs.jsonl.123.tmp").write_text("half")
    publish(mined, PublishConfig(str(clone), license="mit", commit=True))
    assert sorted(p.name for p in (clone/"pref").iterdir()) == ["README.md", "pairs.jsonl"]
    assert json.loads((clone/"pref/pairs.jsonl").read_text().splitlines()[0])["prompt"]
