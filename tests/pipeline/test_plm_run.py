"""`distlm run` of a masked language model: shards, dense training, then with a memory from the dense model."""

import json
from pathlib import Path

from support import TINY, distlm, write_text
from support.kinds import readable
from support.plm import PLM

SHORT = ["train.updates=6", "train.valid_every=3", "launch.ranks=2"]


def lm(run: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((run / "lm.json").read_text("utf-8"))["splits"]
    return found


def test_dense_then_memory(tmp_path: Path) -> None:
    text, dense, memory = write_text(tmp_path / "text"), tmp_path / "dense", tmp_path / "memory"
    words = readable([*TINY, *PLM, *SHORT, f"shards.text_dir={text}"])
    dry = distlm("run", "plm-base", *words, f"run_dir={dense}", "--dry-run").stdout
    assert "distlm data shard plm-base" in dry and "distlm evaluate plm-base" in dry and "datastore write" not in dry
    distlm("run", "plm-base", *words, f"run_dir={dense}")
    page = (dense / "report.html").read_text("utf-8")
    assert "Masked language model" in page and "top-1 MU" not in page

    # Kim & Jung's Init: from the dense model, with a memory beside the feed-forward networks.
    start = [f"shards.folder={dense / 'shards'}", f"plm.init_from={dense}", "memory.kind=resm", "launch.ranks=1"]
    done = distlm("run", "plm-base", *words, *start, f"plm.texts=[more={dense / 'shards'}]", f"run_dir={memory}")
    assert lm(memory)["more"]["loss_nats"] == lm(memory)["test"]["loss_nats"]
    assert "memory of layer 3: MU" in done.stdout
    assert "top-1 MU" in (memory / "report.html").read_text("utf-8")
