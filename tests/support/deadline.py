"""How long a test waits for what must come. It ends a hang and says nothing about speed: no test asserts on time."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE_S = 900.0 * float(os.environ.get("DISTLM_TEST_PATIENCE", "1"))
"""For every wait: a start on an idle machine takes seconds, beside other work on a slow one it took minutes.
pytest's own timeout (pyproject.toml, PYTEST_TIMEOUT) is for a whole test and longer."""

Found = TypeVar("Found")


def until(
    true: Callable[[], Found],
    what: Callable[[], str] | str = "it",
    alive: Callable[[], bool] = lambda: True,
    pause: float = 0.005,
) -> Found:
    """Poll until `true()`, and return that. Fails with what was awaited when the time, or `alive()`, ends first."""
    start = time.monotonic()
    while True:
        # In this order: what ends may have done it last.
        lives = alive()
        if found := true():
            return found
        waited = time.monotonic() - start
        assert lives and waited < DEADLINE_S, f"waited {waited:.0f} s for {what() if callable(what) else what}"
        time.sleep(pause)
