"""One thread a process: tests work on tensors too small to share, and their subprocesses inherit it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
