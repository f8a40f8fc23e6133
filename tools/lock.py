"""requirements.lock: constraints.txt again, with the SHA-256 of each file that CI may install; the book's file as well.

`lock.py` writes them (`make lock`), with the hashes that uv reads from PyPI. CI installs these files and no others
(`make install LOCKED=1`: pip --require-hashes), on Linux with an x86_64 processor and Python 3.11 or 3.13, so torch is
its build for CPUs there, from PyTorch's own index.
"""
import re
import subprocess
import sys
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# What CI installs: the versions of constraints.txt, and the SHA-256 of each file that is taken for one of them.
# Written by `make lock` (tools/lock.py). Do not edit by hand.
"""
# Of https://download.pytorch.org/whl/cpu/torch/, Linux, x86_64: what PyPI has under this version brings CUDA.
TORCH = "2.13.0"
TORCH_CPU = {
    "cp311": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "cp313": "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
}


def compiled(*options: str, text: str = "") -> str:
    "What `uv pip compile` says: pins, each with the hashes of its files on PyPI."
    uv = which("uv", path=Path(sys.executable).parent)
    if not uv:
        sys.exit("error: uv is not installed beside this Python: run `make lock`")
    common = "--universal --generate-hashes --no-annotate --no-config --no-emit-index-url -q --python-version 3.11"
    command = [uv, "pip", "compile", *common.split(), *options]
    done = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: uv could not look up the hashes:\n{done.stderr}")
    return done.stdout


def main() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if f"\ntorch=={TORCH}\n" not in constraints:
        sys.exit("error: constraints.txt pins another torch: put its version and the hashes of its wheels for CPUs "
                 "into tools/lock.py, from https://download.pytorch.org/whl/cpu/torch/")
    hashes = f"torch=={TORCH}" + "".join(f" \\\n    --hash=sha256:{digest}" for digest in TORCH_CPU.values()) + "\n"
    pins = compiled("--no-deps", "--no-header", "-", text=constraints)
    lines, found = re.subn(r"^torch==.*\n(?:    .*\n)*", lambda _: hashes, pins, flags=re.M)
    assert found == 1
    (ROOT / "requirements.lock").write_text(HEADER + lines, encoding="utf-8")
    # what is pinned in the book's file stays as it is, but for what docs/requirements.in asks anew
    compiled("docs/requirements.in", "-o", "docs/requirements.txt")


if __name__ == "__main__":
    main()
