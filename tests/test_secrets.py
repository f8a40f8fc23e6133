"Twelve kinds of secret are planted, a judge repeats them all, and after a whole lesson no byte of them is left"
import json, os, shutil, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from wikidpo.core.files import UserError
from wikidpo.run.config import PublishConfig
from wikidpo.run.publish import publish, refuse_secrets
from wikidpo.run.secrets import find_secret, redact

IN_ENVIRONMENT = { # made up, all of them
    "WIKIDPO_TEACHER_KEY": "teacher-Zq81xw77planted", "WIKIDPO_POLICY_KEY": "policy-Zq82xw77planted",
    "OPENAI_API_KEY": "sk-proj-Zq83xw77plantedplanted", "HF_TOKEN": "hf_Zq84xw77plantedplantedplanted",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "DATABASE_PASSWORD": "a pass & phrase/Zq85"}
IN_URLS = {"password": "pass-Zq86xw77planted", "query": "query-Zq87xw77planted", "proxy": "proxy-Zq88xw77planted",
           "remote": "ghp_Zq89xw77plantedplantedplanted"}
LOOKING_SO = {"AWS": "AKIAZQ90XW77PLANTED0", "token": "eyJhbGciOiJI.eyJzdWIiOiIx.Zq91xw77planted"}
PLANTED = [*IN_ENVIRONMENT.values(), *IN_URLS.values(), *LOOKING_SO.values()]


class TellTale(BaseHTTPRequestHandler):
    "A judge that judges at random; every fifth reply repeats what it was sent, and what it knows besides"
    asked = 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        TellTale.asked += 1
        n, longest = TellTale.asked, json.loads(body)["max_tokens"]
        words = f"{self.path} {dict(self.headers)} {' '.join(PLANTED)}"
        if n > 3 and n % 5 == 0: self.answer(200, words)
        elif n > 3 and n % 17 == 0: self.answer(422, words)
        else: self.answer(200, "AB"[n % 2] if longest == 3 else str(1 + n * 7 % 10))

    def answer(self, status, text):
        message = {"role": "assistant", "content": text}
        reply = {"choices": [{"index": 0, "message": message}]} if status == 200 else {"error": {"message": text}}
        data = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m"} | reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args): pass


@pytest.fixture
def judge():
    server = ThreadingHTTPServer(("127.0.0.1", 0), TellTale)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"me:{IN_URLS['password']}@127.0.0.1:{server.server_port}"
    yield f"http://{where}/v1?api_key={IN_URLS['query']}"
    server.shutdown()
    server.server_close()


def git(where, *words): subprocess.run(["git", "-C", str(where), *words], check=True, capture_output=True)


def repository(path):
    "A git repository whose remote has a token in its URL"
    path.mkdir()
    git(path, "init", "-q")
    git(path, "config", "user.name", "me")
    git(path, "config", "user.email", "me@example.org")
    git(path, "commit", "-q", "--allow-empty", "-m", "first")
    git(path, "remote", "add", "origin", f"https://{IN_URLS['remote']}:x-oauth-basic@127.0.0.1:9/me/data.git")
    return path


def leaks(folder):
    "[(file, what of PLANTED is in it)]; git's own record of its remote is not ours"
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "config"]
    held = [(p.relative_to(folder), p.read_bytes()) for p in files]
    return [(p, secret) for p, data in held for secret in PLANTED if secret.encode() in data]


def test_no_byte_of_a_secret_is_left_by_a_lesson(tmp_path, judge, monkeypatch):
    work = repository(tmp_path/"work")
    proxy = f"http://me:{IN_URLS['proxy']}@127.0.0.1:9"
    ours = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} # other tests leave a service there
    env = ours | IN_ENVIRONMENT | {"HTTPS_PROXY": proxy, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from wikidpo.cli import main; main()", "lesson", "--out", "run",
               "--teacher.url", judge,
               "--mine.n-prompts", "40", "--judge.n", "24", "--train.batch-size", "4", "--train.wandb", "offline"]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path/"log").write_text(done.stdout + done.stderr)
    assert (work/"run/report.html").exists() and list(work.glob("run/wandb/offline-run-*/*.wandb"))
    assert "***" in (work/"run/samples.jsonl").read_text()            # the judge did tell
    for name, value in IN_ENVIRONMENT.items(): monkeypatch.setenv(name, value)
    clone = repository(tmp_path/"clone")
    said = publish(work/"run", PublishConfig(str(clone), license="mit", commit=True))
    with pytest.raises(UserError, match="git push: fatal") as e:
        publish(work/"run", PublishConfig(str(clone), license="mit", push=True))
    (tmp_path/"said").write_text(f"{said} {e.value}")
    assert len(PLANTED) == 12 and TellTale.asked > 100 and leaks(tmp_path) == []


def test_every_planted_kind_is_known(monkeypatch):
    "In any surroundings, as it is and as URLs spell it; and what is no secret stays"
    for name, value in IN_ENVIRONMENT.items(): monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{IN_URLS['proxy']}@127.0.0.1:9")
    urls = [f"http://me:{IN_URLS['password']}@h/v1", f"http://h/v1?n=1&api_key={IN_URLS['query']}&m=2",
            IN_URLS["proxy"], f"https://{IN_URLS['remote']}@h/x.git", "a%20pass%20%26%20phrase%2FZq85"]
    for secret in [*IN_ENVIRONMENT.values(), *LOOKING_SO.values(), *urls]:
        for text in (secret, f"({secret})", f'"{secret}"', f"key={secret}\n", f"ä{secret}ö", secret * 2):
            left = redact(text)
            assert "planted" not in left.lower() and "Zq8" not in left and "0123456789" not in left, left
            assert find_secret(text) and secret not in find_secret(text)
    for text in ("The capital of Peru is Lima.", "sk-", "https://example.org/wiki/Key?title=Token", "a@b.org", "7"):
        assert redact(text) == text and find_secret(text) is None


@pytest.mark.parametrize("before", [" ", "\n", "\t", '"'])
@pytest.mark.parametrize("secret", [
    "sk-Zq83xw77plantedplanted", IN_URLS["remote"], LOOKING_SO["AWS"], "pa\"ss\\Zq85w77"])
def test_a_secret_in_a_pair_is_found_wherever_it_stands(monkeypatch, secret, before):
    "Also at the start of a line, which JSON writes as a letter n before it; and where JSON would escape it"
    monkeypatch.setenv("DATABASE_PASSWORD", "pa\"ss\\Zq85w77")
    fine = {"prompt": "Who?", "chosen": "You."}
    spoilt = fine | {"turns": [["Yes?", f"It is:{before}{secret} "]]}
    refuse_secrets("pairs.jsonl", [fine], "a card")
    with pytest.raises(UserError, match="pair 2 holds "): refuse_secrets("pairs.jsonl", [fine, spoilt], "a card")


@pytest.mark.parametrize("secret", [IN_ENVIRONMENT["DATABASE_PASSWORD"], IN_URLS["remote"], LOOKING_SO["AWS"]])
def test_pairs_with_a_secret_are_not_published(tmp_path, monkeypatch, secret):
    from wikidpo.cli import main
    monkeypatch.setenv("DATABASE_PASSWORD", IN_ENVIRONMENT["DATABASE_PASSWORD"])
    main(["mine", "--n-prompts", "24", "--out", str(tmp_path/"run")])
    path, clone = tmp_path/"run/pairs.jsonl", repository(tmp_path/"clone")
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(json.loads(first) | {"chosen": f"It is {secret}."}), *rest]) + "\n")
    for options in ({}, {"commit": True}, {"push": True}):
        with pytest.raises(UserError, match="pair 2 holds ") as e:
            publish(tmp_path/"run", PublishConfig(str(clone), license="mit", **options))
        assert secret not in str(e.value) and [p.name for p in clone.iterdir()] == [".git"]
    shutil.rmtree(tmp_path/"run")
