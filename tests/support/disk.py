"""A disk of a given size: a real one cannot be filled here."""

import shutil
from pathlib import Path

import pytest

from distlm.runtime.files import bytes_below


def small_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, room: int) -> None:
    """What is below `folder` is all that is on the disk, which has `room` bytes."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=room - bytes_below(folder)))
