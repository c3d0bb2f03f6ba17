"""`distlm run` of a masked language model: shards, dense training, then with a memory from the dense model."""

import json
from pathlib import Path

import pytest
from plm_support import PLM
from support import TINY, distlm, write_text

SHORT = ["train.updates=6", "train.valid_every=3", "launch.ranks=2"]


def lm(run: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((run / "lm.json").read_text("utf-8"))["splits"]
    return found


def test_dense_then_memory(tmp_path: Path) -> None:
    text, dense, memory = write_text(tmp_path / "text"), tmp_path / "dense", tmp_path / "memory"
    words = [*TINY, *PLM, *SHORT, f"shards.text_dir={text}"]
    dry = distlm("run", "demo", *words, f"run_dir={dense}", "--dry-run").stdout
    assert "distlm data shard demo" in dry and "distlm evaluate demo" in dry and "datastore write" not in dry
    distlm("run", "demo", *words, f"run_dir={dense}")
    again = distlm("run", "demo", *words, f"run_dir={dense}")
    assert "complete; nothing to do" in again.stderr
    page = (dense / "report.html").read_text("utf-8")
    assert "Masked language model" in page and "top-1 MU" not in page

    # KJ's Init, zero-shock: the memory of zeros adds nothing, so update 0 is the dense model's end.
    start = [f"shards.folder={dense / 'shards'}", f"plm.init_from={dense}", "memory.kind=resm", "memory.values=zero"]
    frozen = ["train.lr=0", "memory.lr=0", "train.warmup_updates=0"]
    distlm("run", "demo", *words, *start, *frozen, "train.updates=1", f"run_dir={tmp_path / 'still'}")
    for split in ("valid", "test"):
        assert lm(tmp_path / "still")[split]["loss_nats"] == pytest.approx(lm(dense)[split]["loss_nats"], abs=1e-6)
    done = distlm("run", "demo", *words, *start, f"plm.texts=[more={dense / 'shards'}]", f"run_dir={memory}")
    assert lm(memory)["more"]["loss_nats"] == lm(memory)["test"]["loss_nats"]
    assert "memory of layer 3: MU" in done.stdout
    assert "top-1 MU" in (memory / "report.html").read_text("utf-8")
