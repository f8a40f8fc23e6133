"What the tests of compiled code share"
import os
import shutil
import subprocess
import sys

import pytest

COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")


def run_without_compiler(program, scratch):
    "The finished process of a Python program on a machine without a compiler; its argument: the folder of the tests"
    env = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(scratch)}
    command = [sys.executable, "-c", program, os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "goes on without compiled blocks, and slower: InvalidCxxCompiler: No working C++ compiler" in done.stderr
    return done
