"""The environment of the tests and of their subprocesses.

One thread for each process: the tensors of tests are too small for more. The Hub is a server on this machine, so an
offline mode that the user has set is turned off.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
for offline in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.pop(offline, None)
