"""What 100,000 prompts and their pairs cost: time, growth and memory of whatever reads a run.

Each job runs in a process of its own on a run folder of `small` prompts, then on one of `large`. The rows are those of
the shipped pairs, over and over."""
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import inside
from worker import serve
from yardstick import WIKIDPO

SCORED = .95 # of the prompts, in the mining that goes on
STEPS = 3125 # of the training that the doctor examines: 100,000 pairs, 32 at a time


def write(path, rows):
    "A JSONL file, a row at a time"
    with open(path, "w", encoding="utf-8") as f: f.writelines(json.dumps(row) + "\n" for row in rows)


def responses(pairs, prompts):
    "Four responses to each prompt, in the order of the prompts"
    for i in range(prompts):
        pair, other = pairs[i % len(pairs)], pairs[(i + 1) % len(pairs)]
        for k, side in enumerate(("chosen", "rejected", "chosen", "rejected")):
            said = pair if k < 2 else other
            yield {"prompt_id": i, "k": k, "prompt": pair["prompt"], "text": said[side],
                   "temperature": said[f"temp_{side}"], "ids": said[f"{side}_tokens"],
                   "finished": said[f"{side}_finished"]}


def scored(rows):
    "The same with scores; one in a hundred could not be read"
    for n, row in enumerate(rows):
        score = None if n % 100 == 99 else (9, 3, 7, 2)[row["k"]]
        yield row | {"score": score, "reply": str(score)}


def verdicts(pairs, prompts):
    "A comparison for each prompt"
    for i in range(prompts):
        pair, result = pairs[i % len(pairs)], ("a", "b", "tie")[i % 3]
        yield {"prompt_id": i, "prompt": pair["prompt"], "a": pair["chosen"], "b": pair["rejected"],
               "first": "A", "second": "B", "result": result}


def metrics():
    "The log of a long training"
    for step in range(1, STEPS + 1):
        learnt = 1 - .998**(step - 1)
        yield {"step": step, "loss": .6931 - .2 * learnt, "reward/chosen": -.1 * learnt, "reward/rejected": -learnt,
               "reward/margin": .9 * learnt, "reward/accuracy": .5 + .3 * learnt, "grad_norm": .5, "lr": 1e-6}


def finished_run(run, prompts):
    "What is read of a run with so many prompts"
    pairs = inside.shipped_pairs()
    run.mkdir()
    write(run/"samples.jsonl", scored(responses(pairs, prompts)))
    write(run/"pairs.jsonl", (pairs[i % len(pairs)] for i in range(prompts)))
    write(run/"verdicts.jsonl", verdicts(pairs, prompts))
    write(run/"metrics.jsonl", metrics())
    (run/"config.yaml").write_text("train:\n  beta: 0.1\n")
    return run


def killed_mining(folder, prompts):
    "Start the real command, and kill it as soon as it has made the folder its own; its words"
    pairs, run = inside.shipped_pairs(), folder/"run"
    write(folder/"prompts.jsonl", ({"prompt": pairs[i % len(pairs)]["prompt"]} for i in range(prompts)))
    words = ["mine", "--out", run, "--prompts", folder/"prompts.jsonl", "--n-prompts", prompts]
    process = subprocess.Popen([sys.executable, "-c", WIKIDPO, *map(str, words)], stdout=sys.stderr)
    while not (run/"config.yaml").exists():
        time.sleep(.01)
        if process.poll() is not None: raise RuntimeError("mining ended before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    write(run/"responses.jsonl", responses(pairs, prompts))
    return list(map(str, words))


def mining(share):
    "`wikidpo mine`, with this share of the prompts scored already"
    def job(folder, prompts):
        words = killed_mining(folder, prompts)
        rows = responses(inside.shipped_pairs(), int(share * prompts))
        write(folder/"run"/"samples.jsonl", scored(rows))
        return inside.command(words)
    return job


def reading(job):
    "A job that only needs the finished run"
    def on_run(folder, prompts):
        job(finished_run(folder/"warm", 20)) # imports what it needs
        run = finished_run(folder/"run", prompts)
        return lambda: job(run)
    return on_run


JOBS = { # name -> job(folder, prompts) -> what is timed
    "load-mine": mining(SCORED),
    "load-filters": mining(1),
    "load-pairs": reading(inside.read_pairs),
    "load-report": reading(inside.report),
    "load-doctor": reading(inside.doctor),
    "load-inspector": reading(lambda run: inside.inspect(run/"pairs.jsonl")),
    "load-inspector-samples": reading(lambda run: inside.inspect(run/"samples.jsonl")),
    "load-vote": reading(lambda run: inside.vote(run/"verdicts.jsonl")),
}


def peak_gb():
    "The most memory that this process has held"
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def measured(name, prompts):
    "In a process of its own: {seconds, peak_gb}"
    command = [sys.executable, __file__, "job", name, str(prompts)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr.strip().split("\n")[-1])
    return json.loads(done.stdout.strip().split("\n")[-1])


def one_job(name, prompts):
    "What the process of `measured` does"
    with tempfile.TemporaryDirectory() as folder:
        job = JOBS[name](Path(folder), prompts)
        start = time.process_time()
        job()
        print(json.dumps({"seconds": time.process_time() - start, "peak_gb": peak_gb()}))


def contestant(name):
    "A job with few and with many prompts; its seconds of processor time with many, and how they grew"
    def get_ready(task):
        def run():
            small, large = (measured(name, task[size]) for size in ("small", "large"))
            return large["seconds"], {"growth": large["seconds"] / small["seconds"], "peak_gb": large["peak_gb"]}
        return run
    return get_ready


if __name__ == "__main__" and sys.argv[1] == "job": one_job(sys.argv[2], int(sys.argv[3]))
elif __name__ == "__main__": serve({name: contestant(name) for name in JOBS})
