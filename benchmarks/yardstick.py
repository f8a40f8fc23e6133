"What everything else is held against: how fast this machine multiplies matrices and reads memory, and how long the whole lesson takes"
import subprocess, sys, tempfile
from time import perf_counter

from worker import serve


def product(dtype):
    def get_ready(task):
        import torch
        n, cuda = task["size"], task["device"] == "cuda"
        a, b = (torch.randn(n, n, device=task["device"], dtype=getattr(torch, dtype)) for _ in range(2))
        def run():
            for _ in range(task["times"]): a @ b
            if cuda: torch.cuda.synchronize()
            return task["times"] * 2 * n**3 / 1e9
        run()
        return run
    return get_ready


def memory(task):
    import torch
    x = torch.ones(task["size"])                                     # float32, far larger than the caches
    def run():
        for _ in range(task["times"]): x.sum()
        return task["times"] * 4 * task["size"] / 1e9
    run()
    return run


def lesson(task):
    def run():
        with tempfile.TemporaryDirectory() as out:
            start = perf_counter()
            subprocess.run([sys.executable, "-c", "from wikidpo.cli import main; main()", "lesson", "--out", f"{out}/run", *task["args"]], check=True, stdout=sys.stderr)
            return perf_counter() - start
    return run


if __name__ == "__main__": serve({"float32": product("float32"), "bfloat16": product("bfloat16"), "memory": memory, "whole": lesson})
