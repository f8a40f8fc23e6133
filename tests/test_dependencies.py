"What the project is built from: the lock of CI, the licences, and what is made of an audit"
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from test_packaging import canonical

import audit
import licences
import lock

ROOT = Path(__file__).resolve().parent.parent
HASH = r" \\\n    --hash=sha256:[0-9a-f]{64}"


def pins(text):
    "{package: version} of the lines of a file"
    return {canonical(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.M)}


def test_the_lock_is_constraints_with_hashes_and_nothing_else():
    "No package without a hash, no other version, no address and no option"
    text = (ROOT/"requirements.lock").read_text(encoding="utf-8")
    assert pins(text) == pins((ROOT/"constraints.txt").read_text(encoding="utf-8"))
    body = text.removeprefix(lock.HEADER)
    assert re.fullmatch(rf"(?:[\w.-]+==[\w.]+(?: ; python_version >= '3\.\d+')?(?:{HASH})+\n)+", body)


def test_the_lock_takes_no_other_torch_than_the_builds_for_cpus():
    text = (ROOT/"requirements.lock").read_text(encoding="utf-8")
    found = re.search(rf"^torch=={re.escape(lock.TORCH)}((?:{HASH})+)\n", text, re.M)
    assert re.findall("[0-9a-f]{64}", found[1]) == list(lock.TORCH_CPU.values())


def test_a_newer_torch_wants_its_hashes_first(tmp_path, monkeypatch):
    (tmp_path/"constraints.txt").write_text("# pins\ntorch==99.0\ntqdm==4.70.1\n")
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="constraints.txt pins another torch"): lock.main()
    assert [p.name for p in tmp_path.iterdir()] == ["constraints.txt"]


# --- licences

def test_the_page_of_licences_says_what_is_installed():
    "Of the packages of constraints.txt: another machine may have others, for instance CUDA's"
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (.+) \|$", (ROOT/"DEPENDENCIES.md").read_text(encoding="utf-8"), re.M))
    run, dev = licences.needed()
    pinned = pins((ROOT/"constraints.txt").read_text(encoding="utf-8"))
    installed = {name: licences.licence(dist) for name, dist in (run | dev).items() if name in pinned}
    assert rows.items() >= installed.items(), "run `make licences`"
    assert {*rows} - {"package"} == {*pinned}, "run `make licences`"


def stated(folder, *lines):
    "What a package says of its licence that has these lines in its metadata"
    info = folder/"odd-1.0.dist-info"
    info.mkdir()
    (info/"METADATA").write_text("\n".join(["Metadata-Version: 2.4", "Name: odd", "Version: 1.0", *lines]) + "\n")
    return licences.licence(metadata.PathDistribution(info))


@pytest.mark.parametrize("lines", [
    ["License-Expression: MIT AND GPL-3.0-only"], ["License: AGPL-3.0"], [], ["License: Free for research"],
    ["Classifier: License :: OSI Approved :: MIT License", "Classifier: License :: Other/Proprietary License"]])
def test_a_licence_that_is_not_on_the_list_is_refused(tmp_path, lines):
    assert not licences.on_the_list(stated(tmp_path, *lines))


@pytest.mark.parametrize("lines", [
    ["License-Expression: (Apache-2.0 OR MIT) AND BSD-3-Clause"], ["License: MIT"],
    ["Classifier: License :: OSI Approved :: ISC License (ISCL)"]])
def test_a_licence_on_the_list_is_taken(tmp_path, lines):
    assert licences.on_the_list(stated(tmp_path, *lines))


# --- audit: reports as pip-audit writes them

SAFE = {"name": "idna", "version": "3.20", "vulns": []}
HOLED = {"name": "starlette", "version": "1.10.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.10.1"]}]}
UNKNOWN = {"name": "cwevals", "skip_reason": "Dependency not found on PyPI and could not be audited"}


@pytest.mark.parametrize("found, status, says", [
    ([SAFE], 0, "0 known holes in 1 packages"),
    ([SAFE, HOLED], 1, "starlette 1.10.0: PYSEC-1, mended in 1.10.1"),
    ([SAFE, UNKNOWN], 0, "not in the database: cwevals"),
    ([UNKNOWN] * 3, 0, "skipped: the database knows none of the 3 packages"),
])
def test_an_audit_fails_for_a_hole_and_says_what_it_did_not_look_at(found, status, says):
    report = json.loads(json.dumps({"dependencies": found, "fixes": []}))
    got, text = audit.judge(report)
    assert got == status and says in text


def test_an_accepted_hole_does_not_fail(monkeypatch):
    monkeypatch.setattr(audit, "ACCEPTED", {"PYSEC-1": "no server of ours takes uploads"})
    assert audit.judge({"dependencies": [HOLED]}) == (0, "0 known holes in 1 packages")


@pytest.mark.parametrize("said, status", [
    ("requests.exceptions.ConnectionError: Failed to resolve 'nowhere'", 0),
    ("pip-audit: error: requirements.lock: no such file", 1), ("", 1)])
def test_only_a_database_out_of_reach_is_an_excuse(said, status):
    assert audit.unanswered(said)[0] == status


def test_every_file_of_hashes_is_audited_and_one_hole_in_either_fails(tmp_path, monkeypatch):
    pinned = {p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.lock"), *ROOT.glob("docs/*.txt"))}
    assert set(audit.FILES) == pinned
    program = tmp_path/"pip-audit"
    program.write_text(f"#!{sys.executable}\nimport sys\n"
                       f"print({json.dumps(dict(dependencies=[HOLED]))!r} if 'docs' in sys.argv[2] else "
                       f"{json.dumps(dict(dependencies=[SAFE]))!r})\n")
    program.chmod(0o755)
    monkeypatch.setattr(audit, "which", lambda name, path: str(program))
    monkeypatch.setattr(sys, "argv", ["audit.py"])
    assert audit.main() == 1


def test_tools_that_read_pins_leave_pip_alone():
    "Whoever has imported pip keeps Python's own distutils, with which PyTorch's compiler does not work"
    code = "import sys; sys.path.insert(0, 'tools'); import licences, lock, audit; print('pip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
