"""Entry point of the `distlm` command and of `python -m distlm`: it listens for stop signals before all other imports.

Importing the rest takes seconds, and a signal that came in them would end the process as a crash.
"""

from distlm.errors import EXIT_STOPPED
from distlm.runtime.stop import ignore_late_signals, listen, report_stop


def main() -> None:
    """Exits 0 done, 1 error, 2 usage, 75 stopped."""
    listen()
    from distlm.cli import main as run

    try:
        run()
    except SystemExit as end:
        if end.code == EXIT_STOPPED:
            report_stop()
        raise
    finally:
        ignore_late_signals()
