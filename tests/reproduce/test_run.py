"""Experiments run as commands; the runs are real ones of tiny models."""

import json
from pathlib import Path

import pytest

from distlm.errors import EXIT_DONE, EXIT_STOPPED, DistlmError, UsageError
from distlm.reproduce.experiment import Experiment, Item, load_experiment
from distlm.reproduce.run import plan_experiment, run_experiment

TINY = (
    "shards.vocabulary_size=80", "shards.row_tokens=16", "shards.chunk_rows=4", "shards.shard_text=3000",
    "plm.layers=3", "plm.width=16", "plm.heads=2", "plm.ffn_width=32", "plm.max_positions=16", "memory.sub_keys=4",
    "memory.k=2", "memory.key_width=8", "train.updates=4", "train.valid_every=2", "train.save_every=2",
    "train.warmup_updates=1", "train.blocks_per_update=4", "train.micro_blocks=4", "launch.ranks=1", "launch.threads=1",
)  # fmt: skip


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for split, lines in (("train", 300), ("valid", 20), ("test", 20)):
        text = "\n\n".join(f"the {split} of {number} words is a line of {number % 7} ends" for number in range(lines))
        (folder / f"{split}.txt").write_text(text, "utf-8")
    return folder


def test_a_stopped_experiment_goes_on_and_ends_in_tables(
    tmp_path: Path, books: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(*settings: str) -> int:
        experiment = load_experiment("pkm-plm", tmp_path / "runs", {"books": str(books)}, [*TINY, *settings], ["pkm"])
        return run_experiment(experiment)

    assert start("train.max_updates_this_run=2") == EXIT_STOPPED
    assert "stopped; run the same command again to continue" in capfd.readouterr().err
    assert start() == EXIT_DONE
    root, shown = tmp_path / "runs", capfd.readouterr().out
    found = json.loads((root / "pkm" / "lm.json").read_text("utf-8"))
    perplexity = f"{found['splits']['valid']['perplexity']:.2f}"
    table = (root / "pretraining.md").read_text("utf-8")
    assert table.splitlines()[0] in shown and "| +PKM " in table and perplexity in table
    curve = (root / "curve.csv").read_text("utf-8").splitlines()
    assert [line.split(",")[1] for line in curve if line.startswith("pkm,")] == ["2", "4"]
    stale = [line.split(",") for line in (root / "staleness.csv").read_text("utf-8").splitlines()[1:]]
    assert sum(int(line[3]) for line in stale if line[:2] == ["pkm", "2"]) == 16
    for name in ("curve.png", "staleness.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG")


def test_several_at_once_write_logs_and_a_failure_names_its_own(tmp_path: Path, books: Path) -> None:
    def shard(name: str, text: Path) -> Item:
        folder = tmp_path / "runs" / name
        place = (f"name={name}", f"run_dir={folder}", f"shards.text_dir={text}")
        return Item(name, "data shard", "plm-small", folder, (*place, *TINY), ())

    items = shard("one", books), shard("two", tmp_path / "nowhere")
    experiment = Experiment("x", "title", tmp_path / "runs", "distlm.analysis.pkm_plm:write_tables", items)
    assert plan_experiment(experiment).splitlines()[1].startswith("distlm data shard plm-small name=one")
    with pytest.raises(DistlmError, match=r"two failed; its output is in .*logs/two.log. Alone: distlm data shard"):
        run_experiment(experiment, at_once=2)
    assert "nowhere" in (tmp_path / "runs" / "logs" / "two.log").read_text("utf-8")
    # What was under way beside it came to its end.
    assert (tmp_path / "runs" / "one" / "shards" / "manifest.json").exists()


def test_a_wrong_setting_is_refused_before_anything_runs(tmp_path: Path, books: Path) -> None:
    experiment = load_experiment("pkm-plm", tmp_path / "runs", {"books": str(books)}, ["train.updatez=3"])
    with pytest.raises(UsageError, match=r"unknown key 'train\.updatez'"):
        run_experiment(experiment)
    assert not (tmp_path / "runs").exists()
