"""Known security holes of what CI installs: pip-audit on requirements.lock and the book's requirements (`make audit`).

Fails if a version that is pinned there has one. Where the database cannot be asked, it says so and passes: pip-audit
itself also passes where an index knows of no package at all, which must not look like "nothing found".
"""
import json
import re
import subprocess
import sys
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parent.parent
FILES = ("requirements.lock", "docs/requirements.txt")
ACCEPTED = {}  # {id of a hole: why it cannot harm here}


def judge(report: dict) -> tuple[int, str]:
    "(exit status, what to say) of a report of pip-audit."
    asked = [package for package in report["dependencies"] if "skip_reason" not in package]
    unknown = [package["name"] for package in report["dependencies"] if "skip_reason" in package]
    if not asked:
        return 0, f"skipped: the database knows none of the {len(unknown)} packages, so nothing was looked at"
    holes = [hole(package, v) for package in asked for v in package["vulns"] if v["id"] not in ACCEPTED]
    not_asked = [f"not in the database: {', '.join(sorted(unknown))}"] if unknown else []
    found = [f"{len(holes)} known holes in {len(asked)} packages"]
    return int(bool(holes)), "\n".join(holes + not_asked + found)


def hole(package: dict, found: dict) -> str:
    "One hole in a line."
    mended = ", ".join(found["fix_versions"]) or "no version yet"
    return f"{package['name']} {package['version']}: {found['id']}, mended in {mended}"


def unanswered(stderr: str) -> tuple[int, str]:
    "The same where pip-audit ended without a report: only a database out of reach is an excuse."
    why = (stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
    if re.search("ConnectionError|ServiceError|HTTPError|Timeout", stderr):
        return 0, f"skipped: the database is out of reach ({why})"
    return 1, f"pip-audit failed: {why}"


def audited(program: str, name: str) -> tuple[int, str]:
    "What pip-audit says of one file of pins."
    options = "--disable-pip --require-hashes --format json --progress-spinner off"
    command = [program, "-r", name, *options.split(), *sys.argv[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        return judge(json.loads(done.stdout))
    except ValueError:
        return unanswered(done.stderr)


def main() -> int:
    program = which("pip-audit", path=Path(sys.executable).parent)
    if not program:
        sys.exit("error: pip-audit is not installed beside this Python: run `make audit`")
    worst = 0
    for name in FILES:
        status, text = audited(program, name)
        print(f"audit of {name}: {text}")
        worst = max(worst, status)
    return worst


if __name__ == "__main__":
    sys.exit(main())
