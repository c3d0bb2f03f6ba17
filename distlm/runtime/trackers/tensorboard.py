"""TensorBoard's event files: RUN/tensorboard/STAGE/, one file a stage, without torch or TensorFlow."""

import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from distlm.runtime.metrics import Line

_FILES = "events.out.tfevents"


class TensorBoardView:
    """Every number of a line is a scalar of the same name, at the line's step and time, rounded to fp32.

    Stages are TensorBoard's runs, because they share names (stage/seconds). A line without a step has its number among
    those of its stage, from 0.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made = 0
        self._begin()

    def renew(self, lines: Sequence[Line]) -> None:
        """Raises OSError where the files cannot be written."""
        self._begin()
        stages: dict[str, list[Event]] = {}
        for line in sorted(lines, key=lambda line: -1 if line.step is None else line.step):
            stages.setdefault(line.stage, []).append(self._event(line))
        for stage, events in stages.items():
            self._write(stage, events)
        # New files first: a TensorBoard that looks meanwhile finds one or both, and reads the later one last.
        for path in self.folder.glob(f"*/{_FILES}.*"):
            if path not in self._files.values():
                path.unlink(missing_ok=True)

    def add(self, line: Line) -> None:
        """Raises OSError where it cannot be written."""
        event = self._event(line)
        if line.stage not in self._files:
            self._write(line.stage, [event])
            return
        with self._files[line.stage].open("ab") as stream:
            RecordWriter(stream).write(event.SerializeToString())

    def close(self, failed: bool) -> None:
        """Nothing is open."""

    def _begin(self) -> None:
        self._files: dict[str, Path] = {}
        self._without_step: dict[str, int] = {}

    def _write(self, stage: str, events: Iterable[Event]) -> None:
        folder = self.folder / stage.replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        self._made += 1
        name = f"{_FILES}.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{self._made:06d}"
        # Tells a TensorBoard that has read the file before to forget its values.
        anew = Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START))
        temporary = folder / ".new"
        with temporary.open("wb") as stream:
            records = RecordWriter(stream)
            for event in (Event(wall_time=time.time(), file_version="brain.Event:2"), anew, *events):
                records.write(event.SerializeToString())
        self._files[stage] = temporary.replace(folder / name)

    def _event(self, line: Line) -> Event:
        step = line.step
        if step is None:
            step = self._without_step.get(line.stage, 0)
            self._without_step[line.stage] = step + 1
        numbers = {name: value for name, value in line.values.items() if isinstance(value, int | float)}
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
        return Event(wall_time=line.time, step=step, summary=Summary(value=values))
