"""The exact versions that `make install` asks pip for.

`pins.py freeze` prints constraints.txt for what this environment has installed of wikidpo[dev].
`pins.py use` prints the constraints for this environment: constraints.txt as it is, or, where the environment sees
the packages of its Python (`make install SYSTEM_TORCH=1`), the same with torch pinned to the version that is there,
and without pins for what torch itself depends on.
"""
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

# pip's own copy where there is no other, in a fresh environment. Not first: whoever has imported pip keeps Python's old
# distutils, and PyTorch's compiler, in the same process, then refuses to work.
try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.specifiers import SpecifierSet
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version

ROOT = Path(__file__).parent.parent
HEADER = """\
# The versions that `make install` uses and that the tests have passed with. Written by
#     .venv/bin/python tools/pins.py freeze > constraints.txt
# in a .venv where newer versions were installed and `make test` passed. Do not edit by hand.
"""


def reached(*requirements: str) -> dict[str, metadata.Distribution]:
    "Installed distributions that `requirements` need, directly or not, by canonical name."
    todo, seen, dists = [Requirement(r) for r in requirements], set(), {}
    while todo:
        req = todo.pop()
        name = canonicalize_name(req.name)
        dist = metadata.distribution(name)
        dists[name] = dist
        for extra in {"", *req.extras} - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            needs = map(Requirement, dist.requires or [])
            todo += [r for r in needs if r.marker is None or r.marker.evaluate({"extra": extra})]
    return dists


def oldest() -> int:
    "The x of the oldest Python 3.x that settings.ini supports."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return int(settings["DEFAULT"]["min_python"].removeprefix("3."))


def pin(dist: metadata.Distribution) -> str:
    "One line of constraints; a version that the oldest supported Python cannot install says so in a marker."
    line = f"{dist.metadata['Name']}=={Version(dist.version).public}"
    allowed = SpecifierSet(dist.metadata["Requires-Python"] or "")
    needed = next(minor for minor in range(oldest(), 100) if allowed.contains(f"3.{minor}.50"))
    return line if needed == oldest() else f'{line} ; python_version >= "3.{needed}"'


def freeze() -> str:
    dists = reached("wikidpo[dev]")
    del dists["wikidpo"]
    return HEADER + "".join(pin(d) + "\n" for _, d in sorted(dists.items()))


def system_torch(constraints: str) -> str:
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        python = sys._base_executable
        sys.exit(f"error: SYSTEM_TORCH=1, but {python} has no torch: name the Python that has it, PYTHON=...")
    theirs = reached("torch")
    pins = [line for line in constraints.splitlines() if line[:1] != "#"]
    kept = [line for line in pins if canonicalize_name(Requirement(line).name) not in theirs]
    return "\n".join([f"torch=={torch.version}", *kept, ""])


def use() -> str:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    settings = (Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8")
    return system_torch(constraints) if "include-system-site-packages = true" in settings else constraints


if __name__ == "__main__":
    sys.stdout.write({"freeze": freeze, "use": use}[sys.argv[1]]())
