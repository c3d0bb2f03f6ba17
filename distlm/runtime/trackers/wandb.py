"""W&B: one run over all stages and starts, RUN/wandb/; offline unless the user is logged in or says otherwise."""

import netrc
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from distlm.runtime.metrics import Line
from distlm.runtime.progress import say
from distlm.runtime.trackers.records import WandbRun

PATIENCE_S = 30.0
"""W&B's server is waited for so long when a run begins and when it ends."""
_unreachable = False
"""Of this process: the server did not answer."""


class WandbView:
    """A row for each line, in the record's order: its values, `stage`, and `step` where it has one, the x axis.

    Offline the files are made anew from the record at each start, so that `wandb sync` sends one whole run. Online the
    server has the rows that it has: those after them are sent, and a step that is repeated after a resume keeps the
    value of the first time.
    """

    name = "wandb"

    def __init__(self, folder: Path, title: str, settings: Mapping[str, Any]) -> None:
        """`folder`: RUN/wandb; `title`: the run's name at W&B; `settings`: shown as its configuration."""
        self.folder, self._title, self._settings = folder, title, settings
        self._run: Any = None
        self._rows = 0
        """Rows that it has."""

    def renew(self, lines: Sequence[Line]) -> None:
        """Raises what wandb does; OSError."""
        if self._run is None or self._run.offline:
            self._open()
        for line in lines[self._rows :]:
            self.add(line)

    def add(self, line: Line) -> None:
        """Raises what wandb does."""
        row = {name: value for name, value in line.values.items() if value is not None}
        if line.step is not None:
            row["step"] = line.step
        self._run.log({**row, "stage": line.stage, "_timestamp": line.time}, step=self._rows, commit=True)
        self._rows += 1

    def close(self, failed: bool) -> None:
        """Waits PATIENCE_S at most for what is not sent yet."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _open(self) -> None:
        global _unreachable
        self.close(failed=False)
        record = self.folder / "run.json"
        if not record.exists():
            WandbRun(id=secrets.token_hex(4)).write(record)
        number = WandbRun.read(record).id
        for old in self.folder.glob(f"offline-run-*-{number}"):
            shutil.rmtree(old)
        offline = _unreachable or is_offline()
        try:
            self._run = self._init(number, offline)
        except wandb.Error as error:
            if offline:
                raise
            say(f"train.trackers: W&B cannot be reached, so wandb is offline: {str(error).splitlines()[0]}")
            _unreachable = True
            wandb.teardown()
            self._run = self._init(number, offline=True)
        self._run.define_metric("*", step_metric="step", step_sync=False)
        self._rows = 0 if self._run.offline else self._run.step

    def _init(self, number: str, offline: bool) -> Any:
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_job_creation=True, x_disable_stats=True,
            init_timeout=PATIENCE_S, login_timeout=PATIENCE_S, finish_timeout=PATIENCE_S,
        )  # fmt: skip
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "distlm"), id=number, name=self._title, config=dict(self._settings),
            dir=self.folder.parent, mode="offline" if offline else None, resume=None if offline else "allow",
            reinit="create_new", settings=settings,
        )  # fmt: skip


def is_offline() -> bool:
    """Whether W&B is not to be asked: WANDB_MODE says so, or says nothing and the user is not logged in.

    Never tries the network: on many clusters the attempt alone hangs.
    """
    if mode := os.environ.get("WANDB_MODE"):
        return mode == "offline"
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return False
    hosts = {urlsplit(wandb.setup().settings.base_url).netloc}
    if "WANDB_BASE_URL" not in os.environ:
        # Keys of before W&B moved stand under its old name.
        hosts.add("api.wandb.ai")
    chosen = os.environ.get("NETRC")
    for path in [Path(chosen)] if chosen else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            known = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        if any(known.authenticators(host) for host in hosts):
            return False
    return True
