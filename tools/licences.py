"""The licences of what wikidpo needs to run, as the installed packages state them.

`licences.py` prints a table, and fails if a package states none or one that asks for more than notices.
"""
import sys
from importlib import metadata

from pins import reached

COPYLEFT = ("agpl", "gpl-", "gnu general", "gnu affero", "sspl", "non-commercial")


def licence(dist: metadata.Distribution) -> str:
    "What a package says of its licence: the expression, the classifiers, or the first line of the field."
    meta = dist.metadata
    named = [c.split(" :: ")[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    first = (meta["License"] or "").strip().partition("\n")[0][:60]
    return meta["License-Expression"] or ", ".join(named) or first


def main() -> None:
    dists = reached("wikidpo")
    del dists["wikidpo"]
    odd = []
    for name, dist in sorted(dists.items()):
        text = licence(dist)
        print(f"{name:40}{dist.version:14}{text or 'states none'}")
        if not text or any(word in text.lower() for word in COPYLEFT): odd.append(name)
    print(f"{len(dists)} packages")
    if odd: sys.exit(f"look at these: {', '.join(odd)}")


if __name__ == "__main__": main()
