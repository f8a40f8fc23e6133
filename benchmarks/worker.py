"""What every worker does: get ready once, then measure once for each line that it is sent.

Needs nothing but Python, so that it runs in every environment. For the same reason the workers import what they
measure inside functions: loading it is part of getting ready, and a peer's environment has not everything."""
import json
import os
import sys
import time
from functools import partial


def fastest(sizes, prepare):
    "The size with which the work goes fastest; prepare(size) gets ready and returns `work`, which returns its amount"
    def rate(size):
        work = prepare(size)
        start = time.perf_counter()
        amount = work()
        return amount / (time.perf_counter() - start)
    return max(sizes, key=rate)


def with_best_batch(task, prepare):
    """The task with as many pairs a forward as go fastest, where it names some to try.

    prepare(task) returns `train`, which trains on a few pairs; its second run counts, when all is warm."""
    if "batches" not in task: return task
    step = task["batch"] * task["accum"]

    def cut(batch): return task | dict(batch=batch, accum=step // batch)

    def warmed(batch):
        train = prepare(cut(batch))
        train()

        def again():
            train()
            return 1
        return again
    return cut(fastest(task["batches"], warmed))


def chosen(task):
    "What is said beside the rate, where each contestant has its own number of pairs a forward"
    return {"pairs_a_forward": task["batch"]} if "batches" in task else {}


def best_batch(task, respond):
    "Prompts at once: what the task says, or with what a part of the work goes fastest"
    return fastest(task["batches"], lambda n: partial(respond, n)) if "batches" in task else task["batch"]


def facts(task, batch, tokens, answers, few=None):
    "What is said beside the rate, where answers have lengths of their own; few: prompts that it is estimated from"
    if "batches" not in task: return {}
    found = {"rows_at_once": batch * len(task["temps"]), "tokens_an_answer": tokens / answers}
    return found | ({"estimated": f"from {few} of the prompts"} if few else {})


def serve(contestants):
    "{name: get_ready(task)}; get_ready returns `run`; run() works once, returns its amount, or (amount, {facts})"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1) # what libraries print goes to the log
    task = json.loads(sys.argv[2])
    start = time.perf_counter()
    run = contestants[sys.argv[1]](task)
    print(json.dumps({"ready_s": time.perf_counter() - start}), file=answers)
    for _ in sys.stdin:
        start = time.perf_counter()
        amount = run()
        seconds = time.perf_counter() - start
        amount, facts = amount if isinstance(amount, tuple) else (amount, {})
        print(json.dumps({"amount": amount, "seconds": seconds} | facts), file=answers)
