"""What a run takes, over all its resumptions."""

import time
from types import SimpleNamespace
from typing import Any

from m2f_trainer.training.callbacks.progress import Cost


def test_time_goes_on_where_a_run_resumes_and_says_on_what() -> None:
    args: Any = SimpleNamespace(world_size=4)
    no: Any = None
    first = Cost()
    first.on_train_begin(args, no, no)
    time.sleep(0.2)
    saved = first.state()
    time.sleep(0.5)  # lost: the run was killed after its save
    second = Cost.from_state(saved)
    second.on_train_begin(args, no, no)
    time.sleep(0.2)
    told = second.state()["attributes"]
    assert 0.35 < told["seconds"] < 0.65
    assert told["processes"] == 4
    assert told["peak_memory"] > 2**20
    assert told["hardware"].strip()
    assert "torch 2" in told["software"]
