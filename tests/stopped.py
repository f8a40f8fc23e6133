"""`wikidpo` killed at each of its writes, and then given once more, undisturbed

    python tests/stopped.py FOLDER EVERY WORDS...

FOLDER is what the command works in; it is put back as it was before each try. The command is killed before its
1st, (1 + EVERY)th, ... file operation, and in the middle of what it writes. Prints {"kills": how many,
"different": [where the second command left other files than an undisturbed one, or failed]} as JSON.
"""
import hashlib, json, os, resource, shutil, signal, sys
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "subprocess.Popen")
SIZES = (0, 50, 700, 9_000) # bytes of a file at which a write is cut


def is_change(event, args):
    "Whether the interpreter is about to change a file, or to start a program that may"
    if event == "open": return isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return event in CHANGES


def killed_before(n):
    "From now on, the n-th change is not made: the process dies"
    left = n
    def hook(event, args):
        nonlocal left
        if not is_change(event, args): return
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def killed_within(size):
    "From now on, a write beyond so many bytes of a file kills the process in its middle"
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run(words, arm=lambda: None):
    "The exit status of the command in a process of its own; below 0: the signal that killed it"
    from wikidpo.cli import main
    if (pid := os.fork()) == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            arm()
            main(words)
        except SystemExit as e: os._exit(e.code or 0)
        except BaseException: os._exit(9)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder):
    "{path: SHA-256} of everything but git's own files"
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and ".git" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def restore(before, folder):
    shutil.rmtree(folder)
    shutil.copytree(before, folder, symlinks=True)


def tries(every, last):
    "(name, arm) of each try; `last` says whether the try before it ended by itself"
    n = 1
    while not last():
        yield f"before change {n}", lambda n=n: killed_before(n)
        n += every
    for size in SIZES: yield f"after {size} bytes", lambda size=size: killed_within(size)


def main(folder, every, *words):
    import wikidpo.models.hf, wikidpo.run.publish # noqa: F401 once, and not in every try
    before, kills = f"{folder}.before", 0
    different, ended = [], []
    shutil.copytree(folder, before, symlinks=True)
    assert run(words) == 0, "the command fails undisturbed"
    want = files(folder)
    for name, arm in tries(int(every), lambda: ended and ended[-1] >= 0):
        restore(before, folder)
        ended.append(run(words, arm))
        kills += ended[-1] < 0
        done, status = files(folder) == want, run(words)              # who is done may refuse to do it again
        if status and not done or files(folder) != want: different.append([name, status, sorted(files(folder))])
    print(json.dumps({"kills": kills, "different": different}))


if __name__ == "__main__": main(*sys.argv[1:])
