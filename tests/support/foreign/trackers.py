"""What other programs read in the views of a run's metrics."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

Curve = list[tuple[int, float]]
"""(step, value) in the order that it is read in."""
_BLOCK = 32768
_PATIENCE_S = 30.0


def scalars(folder: Path) -> dict[str, Curve]:
    """Name → curve, by TensorBoard's own reader of a folder of event files."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder), size_guidance={module.SCALARS: 0})
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def wandb_file(run: Path) -> Path:
    """The one offline run below RUN/wandb."""
    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    return file


def wandb_records(file: Path) -> list[Any]:
    """Records of an offline run: W&B's own classes, from LevelDB's log format (blocks of 32 KiB, parts of records)."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := _BLOCK - at % _BLOCK) < 7:
            at += left
            continue
        _, size, part = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):
            records.append(messages.Record.FromString(whole))
            whole = b""
    return records


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a finished offline run's history, in order."""
    # W&B's own process writes on for a moment after the run is finished, on a busy machine for some seconds.
    deadline, records = time.monotonic() + _PATIENCE_S, wandb_records(file)
    while not any(record.WhichOneof("record_type") == "exit" for record in records) and time.monotonic() < deadline:
        time.sleep(0.1)
        records = wandb_records(file)
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]


def wandb_curve(rows: list[dict[str, Any]], name: str) -> Curve:
    """Of a metric."""
    return [(row["step"], row[name]) for row in rows if name in row and "step" in row]
