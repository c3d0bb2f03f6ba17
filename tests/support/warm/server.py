"""python server.py SOCKET: forks a child for each start (see support.warm); ends when its standard input does."""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

LATER = (
    "deepspeed.runtime.engine", "docstring_parser", "faiss", "jsonargparse", "matplotlib.pyplot", "numba.typed",
    "rich.progress", "safetensors.torch", "sklearn.metrics", "submitit", "tokenizers", "torch._dynamo",
    "torch._inductor", "torch.distributed", "transformers.generation", "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2", "webdataset",
)  # fmt: skip
"""What is imported only where it is needed. Not mpi4py.MPI, whose import starts MPI."""

STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Start:
    """One start: what the started interpreter was given."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    cores: list[int]
    streams: list[int]

    def knows_the_code(self) -> bool:
        """Whether it would import what is imported here: from the folders of PYTHONPATH here, and others perhaps."""
        return set(_path(os.environ)) <= set(_path(self.environment))


def _path(environment: Mapping[str, str]) -> list[str]:
    return environment.get("PYTHONPATH", "").split(os.pathsep)


def import_everything() -> None:
    """No thread may run and nothing be computed here: a forked child has only the thread that forked."""
    for package in map(importlib.import_module, ("distlm", "launchers")):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in LATER:
        importlib.import_module(name)
    # What a plan says of time is looked at where it is made (tests/training, tests/knnlm), not in every start.
    sys.modules["distlm.runtime.plan"].MEASURED_S = 0.01  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()


class Children:
    """The running children, and the sockets of those that started them."""

    def __init__(self, waiting: selectors.BaseSelector) -> None:
        self._waiting = waiting
        self._starters: dict[int, socket.socket] = {}

    def add(self, child: int, starter: socket.socket) -> None:
        """A child is born."""
        self._starters[child] = starter
        self._waiting.register(os.pidfd_open(child), selectors.EVENT_READ, child)
        self._waiting.register(starter, selectors.EVENT_READ, child)
        with contextlib.suppress(OSError):
            starter.sendall(f"{child}\n".encode())

    def kill(self) -> None:
        """All of them."""
        for child in self._starters:
            os.kill(child, signal.SIGKILL)

    def act(self, event: selectors.SelectorKey) -> None:
        """Either it has ended, which its starter is told, or the starter was killed, and it must end."""
        child: int = event.data
        starter = self._starters.get(child)
        if event.fileobj is starter:
            self._waiting.unregister(starter)
            os.kill(child, signal.SIGKILL)
            # Whoever waited for the starter may start the next one now.
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        elif isinstance(event.fileobj, int):
            self._waiting.unregister(event.fileobj)
            os.close(event.fileobj)
            _, status = os.waitpid(child, 0)
            with self._starters.pop(child) as starter, contextlib.suppress(KeyError, OSError):
                self._waiting.unregister(starter)
                starter.sendall(f"{status}\n".encode())


def serve(address: str) -> Start:
    """Answer until standard input ends; returns only in a child."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(128)
    ready = False
    with selectors.DefaultSelector() as waiting:
        children = Children(waiting)
        waiting.register(listener, selectors.EVENT_READ)
        waiting.register(sys.stdin, selectors.EVENT_READ)
        while True:
            events = [event for event, _ in waiting.select()]
            for event in events:
                if event.data:
                    children.act(event)
            if any(event.fileobj is sys.stdin for event in events):
                children.kill()
                sys.exit()
            if not any(event.fileobj is listener for event in events):
                continue
            starter, _ = listener.accept()
            if not ready:
                import_everything()
                ready = True
            try:
                start = receive(starter)
            except (OSError, ValueError):  # killed before it said all
                starter.close()
                continue
            if start.knows_the_code():
                # One that comes before the child listens waits for that; its starter may hand it on at once.
                signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
                child = os.fork()
                if child == 0:
                    return start
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
                children.add(child, starter)
            else:
                with starter, contextlib.suppress(OSError):
                    starter.sendall(b"0\n")
            for stream in start.streams:
                os.close(stream)


def receive(starter: socket.socket) -> Start:
    """What a starter hands over."""
    size, streams, _, _ = socket.recv_fds(starter, 4, 3)
    with starter.makefile("rb") as text:
        return Start(**json.loads(text.read(int.from_bytes(size, "big"))), streams=streams)


def become(start: Start) -> None:
    """In a child: take the starter's place and run what it was to run."""
    for number, stream in enumerate(start.streams):
        os.dup2(stream, number)
    os.closerange(3, 1024)
    os.chdir(start.folder)
    more = [folder for folder in _path(start.environment) if folder not in sys.path]
    os.environ.clear()
    os.environ.update(start.environment)
    os.sched_setaffinity(0, start.cores)
    if "DISTLM_FAIL_AT" in start.environment:
        # Signs of life at the clock's pace would give calls other numbers in each start.
        sys.modules["distlm.runtime.locks.lease"].RENEW_S = 3600.0  # type: ignore[attr-defined]
    if "distlm" in start.arguments[1:4]:
        sys.modules["distlm.runtime.stop"].listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    sys.orig_argv[:] = start.arguments
    sys.path[1:1] = more
    sys.argv[:] = start.arguments[1:]
    if sys.argv[0] == "-u":
        del sys.argv[0]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = start.folder
        if "." in sys.argv[0]:
            # What runs as __main__ is read anew, as ever.
            sys.modules.pop(sys.argv[0], None)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


def end(start: Start) -> NoReturn:
    """Run it and end as Python does, but do not tear the modules down, which would copy all of the server's memory."""
    code = 0
    try:
        become(start)
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            code = leave.code or 0
        else:
            print(leave.code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(serve(sys.argv[1]))
