"""Imported by every Python that a test starts, before anything else.

Hands `python -m PROGRAM …` and `python SCRIPT …` over to the server of support.warm, if there is one, and ends as the
child that the server forks. `python -c …` starts as ever.
"""

import os
import sys

PROGRAMS = ("distlm", "launchers", "deepspeed", "torch")
"""First words of the modules that start warm. Not submitit: it names a local job by the number of its process."""


def hand_over(address: str) -> None:
    """Returns when this must be an ordinary start: no server, another user's, or one that imported other code."""
    import contextlib
    import json
    import signal
    import socket

    passed_on = [getattr(signal, f"SIG{name}") for name in ("HUP", "INT", "TERM", "USR1", "USR2", "CONT")]
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(address)
    except OSError:
        return
    # A signal that comes before the child is known waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    start = {
        "arguments": sys.orig_argv,
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 (pathlib takes time to import)
        "cores": list(os.sched_getaffinity(0)),
    }
    text = json.dumps(start).encode()
    socket.send_fds(server, [len(text).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(text)
    answers = server.makefile("r")
    child = int(answers.readline() or _gone())
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
        return

    def pass_on(number: int, _frame: object) -> None:
        # Its end may not have been told yet.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in passed_on:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    status = int(answers.readline() or _gone())
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def _gone() -> str:
    # An exception would be printed, and the start go on as an ordinary one.
    os.write(2, b"the server of warm starts has ended (tests/support/warm)\n")
    os._exit(1)


def _is_ours() -> bool:
    words = [word for word in sys.orig_argv[1:4] if word != "-u"]
    if words[:1] == ["-m"]:
        return words[1].partition(".")[0] in PROGRAMS
    return bool(words) and not words[0].startswith("-")


if os.environ.get("DISTLM_TESTS_WARM") and _is_ours():
    hand_over(os.environ["DISTLM_TESTS_WARM"])
