"""The long tests of faults, and what they counted: nbs/results/reliability.json, which nbs/run/reliability.ipynb shows.

    reliability.py NAME ...      NAME: see TOPICS; none: all

Ten minutes on one core. What one name finds replaces what stood there for it.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from evidence import RESULTS, ROOT, write_results

TOPICS = {  # name: (the tests, what they do)
    "judge": ("test_judge_faults.py", "a judge's server answers wrongly, late or not at all"),
    "policy": ("test_remote.py", "so does a server that samples"),
    "files": ("test_fuzz.py", "files of a run are damaged before they are read"),
    "stops": ("test_kills.py", "mine, train, judge and sweep are stopped at their writes, and started again"),
    "moves": ("test_stopped.py", "so are import, export and publish"),
    "imports": ("test_import_faults.py", "values in the files of a foreign model are changed before it is imported"),
}


def measured(file: str) -> dict:
    "Run the long tests of a file: how many there are, how many failed, the seconds they took, what they counted."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        how = ["-q", "-m", "slow", "-o", "junit_logging=system-out", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *how, f"tests/{file}"], cwd=ROOT)
        suite = ET.parse(report).getroot().find("testsuite")
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    said = [line for out in suite.iter("system-out") for line in out.text.splitlines()]
    return {"tests": int(suite.get("tests")), "failed": failed, "seconds": float(suite.get("time")), **counted(said)}


def counted(lines: list[str]) -> dict:
    "What the tests said, added up: '12 kills' or {'read': 3, 'refused': 4}."
    found = {}
    for line in lines:
        pairs = re.findall(r"'(\w+)': (\d+)", line)
        if re.fullmatch(r"\d+ [a-z ]+(, \d+ [a-z ]+)*", line):
            pairs = [(name, n) for n, name in re.findall(r"(\d+) ([a-z]+)", line)]
        for name, n in pairs:
            found[name] = found.get(name, 0) + int(n)
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("names", nargs="*", metavar="NAME", choices=[*TOPICS, []])
    for name in ask.parse_args().names or TOPICS:
        file, what = TOPICS[name]
        found = measured(file)
        path = RESULTS / "reliability.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        write_results("reliability", kept | {name: {"what": what, "file": file, **found}})
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
