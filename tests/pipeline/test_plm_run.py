"""`distlm run` of a masked language model: shards, dense training, then with a memory from the dense model."""

import json
from pathlib import Path

from support import TINY, distlm, write_text
from support.config import config_of
from support.finetune import write_sst2
from support.kinds import readable
from support.plm import PLM

from distlm.config.load import load_config
from distlm.errors import EXIT_STOPPED
from distlm.pipeline import plan_pipeline, steps_of
from distlm.runtime.rundir import RunDir

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


def test_tasks_are_fine_tuned_on_after_the_evaluation(tmp_path: Path) -> None:
    """With finetune.tasks there is one stage more: planned, checked before the first one, continued, in the report."""
    text, run, glue = write_text(tmp_path / "text"), tmp_path / "run", write_sst2(tmp_path / "glue", train=32, dev=12)
    settings = [
        *readable([*TINY, *PLM, *SHORT]), f"shards.text_dir={text}", f"run_dir={run}", "launch.ranks=1",
        f"finetune.data_dir={glue}", "finetune.seeds=[1]", "finetune.epochs=1", "finetune.rows_per_update=8",
        "finetune.length=24",
    ]  # fmt: skip
    assert "distlm finetune" not in plan_pipeline(config_of("plm-base", settings), "plm-base", settings)
    settings.append("finetune.tasks=[SST-2,RTE]")
    refused = distlm("run", "plm-base", *settings, check=False)
    assert refused.returncode == 1 and "RTE" in refused.stderr and not (run / "shards").exists(), refused.stderr
    (glue / "RTE").mkdir()
    for path in (glue / "SST-2").iterdir():
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()[1:]]
        named = [[str(number), text, "word1", LABELS[int(label)]] for number, (text, label) in enumerate(rows)]
        lines = ["index\tsentence1\tsentence2\tlabel", *map("\t".join, named)]
        (glue / "RTE" / path.name).write_text("\n".join(lines) + "\n", "utf-8")
    planned = plan_pipeline(config_of("plm-base", settings), "plm-base", settings)
    assert "SST-2: 1 seeds" in planned and "RTE: 1 seeds" in planned and "the model of this configuration" in planned

    stopped = distlm("run", "plm-base", *settings, "finetune.max_updates_this_run=3", check=False)
    assert stopped.returncode == EXIT_STOPPED, stopped.stderr
    assert "[4/4] finetune: stopped; run the same command again to continue" in stopped.stderr
    done = distlm("run", "plm-base", *settings)
    assert "[3/4] evaluate: finished before, skipped" in done.stderr
    assert "finetune: SST-2, dev, median of 1 seeds" in done.stdout and "finetune: RTE, dev" in done.stdout
    page = (run / "report.html").read_text("utf-8")
    assert "<td>SST-2</td><td>SST-2</td><td>accuracy</td><td>1</td>" in page and "<td>RTE</td>" in page
    assert "Masked language model" in page
    config = load_config(str(run))
    assert [step.words for step in steps_of(config)][-1] == "finetune"
    assert all(step.finished(config, RunDir.of(config)) for step in steps_of(config))


LABELS = ("not_entailment", "entailment")
