"""One thread for each process: the tensors of tests are too small for more, and subprocesses inherit the setting."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
