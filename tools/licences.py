"""DEPENDENCIES.md: what wikidpo needs, and the licence of each, as the installed packages state it.

`licences.py` writes it (`make licences`), and fails if a package states a licence that is not on the list below.
"""
import re
import sys
from importlib import metadata
from pathlib import Path

from pins import reached

ROOT = Path(__file__).resolve().parent.parent
# Licences that ask for a notice, or (MPL) for changes to the package itself to be published; as packages name them.
ALLOWED = {
    "0BSD", "3-Clause BSD License", "Apache 2.0", "Apache 2.0 License", "Apache License, Version 2.0", "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception", "Apache Software License", "BSD License", "BSD-2-Clause", "BSD-3-Clause",
    "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "ISC License (ISCL)", "MIT", "MIT License", "MIT-0", "MIT-CMU",
    "MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)", "PSF-2.0", "Python Software Foundation License", "Zlib",
}
PAGE = """\
# What wikidpo needs

With the licence of each package, as the package states it. Written by `make licences`, which refuses a licence that
is not on its list (tools/licences.py). The versions stand in constraints.txt.

Not here: the packages from NVIDIA that come with PyTorch's CUDA build, under NVIDIA's own licence; vLLM, which
`make teacher` installs into an environment of its own; what a notebook brings along that is not from this project.

## To run

{run}

## To develop: tests, notebooks, JupyterLab

{dev}
"""


def licence(dist: metadata.Distribution) -> str:
    "What a package says of its licence: the expression, the classifiers, or the first line of the field."
    meta = dist.metadata
    named = [c.split(" :: ")[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    first = (meta["License"] or "").strip().partition("\n")[0][:60]
    return meta["License-Expression"] or " AND ".join(named) or first


def on_the_list(text: str) -> bool:
    "Whether each licence that is named in a statement is allowed."
    return all({part, part.strip("()")} & ALLOWED for part in re.split(r" (?:AND|OR) ", text))


def table(dists: dict[str, metadata.Distribution]) -> str:
    rows = [f"| {name} | {licence(dist)} |" for name, dist in sorted(dists.items())]
    return "\n".join(["| package | licence |", "|---|---|", *rows])


def needed() -> tuple[dict, dict]:
    "The distributions that running needs, and those that only development needs, by name."
    run, dev = reached("wikidpo"), reached("wikidpo[dev]")
    del run["wikidpo"]
    return run, {name: dist for name, dist in dev.items() if name not in run and name != "wikidpo"}


def main() -> None:
    run, dev = needed()
    odd = [f"{name} ({licence(dist) or 'states none'})" for name, dist in (run | dev).items()
           if not on_the_list(licence(dist))]
    if odd:
        sys.exit(f"error: not on the list of licences in tools/licences.py: {', '.join(sorted(odd))}")
    (ROOT / "DEPENDENCIES.md").write_text(PAGE.format(run=table(run), dev=table(dev)), encoding="utf-8")
    print(f"{len(run)} packages to run, {len(dev)} more to develop")


if __name__ == "__main__":
    main()
