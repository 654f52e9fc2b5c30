"""Tests run in several processes at once, one a core: so torch is to use one thread in each."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
