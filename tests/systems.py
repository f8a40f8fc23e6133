"What tests need of the system"
import os

import pytest

LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc, or counts as Linux does")
