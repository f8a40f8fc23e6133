"What the tools that measure evidence share: the profile's sections, where results lie, and how one is said."
import json
from pathlib import Path

from wikidpo.judge.config import TeacherConfig
from wikidpo.run.config import EvaluateConfig, MineConfig, PolicyConfig, RunTrainConfig
from wikidpo.run.folder import write_atomic
from wikidpo.run.profiles import load_profile, section

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"
PROFILE = load_profile("miniwiki")
SECTIONS = {
    "policy": PolicyConfig,
    "teacher": TeacherConfig,
    "mine": MineConfig,
    "train": RunTrainConfig,
    "judge": EvaluateConfig,
}
JUDGED = ("n", "win", "tie", "loss", "decided_win_rate", "ci_low", "ci_high", "truth_win_rate")


def configured(name: str, profile: dict = PROFILE, **changes):
    "The configuration of a step as a profile has it, the default one if none is given, with these values changed."
    return section(SECTIONS[name], name, profile[name] | changes)


def write_results(name: str, results) -> None:
    "Write nbs/results/`name`.json, which the notebooks show."
    write_atomic(RESULTS / f"{name}.json", json.dumps(results, indent=1) + "\n")


def win_rate(judged: dict) -> str:
    "A win rate with its interval, in percent."
    return f"{judged['decided_win_rate']:.1%} ({judged['ci_low']:.1%} to {judged['ci_high']:.1%})"


def win_rate_of_decided(judged: dict) -> str:
    "A win rate with its interval and the number of comparisons that it rests on."
    interval = f"[{judged['ci_low']:.3f}, {judged['ci_high']:.3f}]"
    return f"win rate {judged['decided_win_rate']:.3f} {interval} of {judged['win'] + judged['loss']}"
