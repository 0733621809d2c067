"""The fault suite runs on its own: `pytest -m "slow or not slow" tests/faults`.

Its tests fork the process they run in, which is safe only while nothing in it has started threads.
"""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every fault test slow, so that the default run, one process for all rooms, leaves it out."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
