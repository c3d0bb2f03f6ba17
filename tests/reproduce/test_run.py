"""Experiments run as commands; the runs are real ones of tiny models."""

import json
from pathlib import Path

import pytest
from support import ENVIRONMENT, warm, write_text
from support import TINY as TINY_KNN
from support.kinds import readable

from distlm.analysis.results.from_csv import lines_of
from distlm.analysis.results.page import numbers, page
from distlm.analysis.results.records import ExperimentResults
from distlm.cli import main
from distlm.errors import EXIT_DONE, EXIT_STOPPED, DistlmError, UsageError
from distlm.reproduce.experiment import Experiment, Item, load_experiment
from distlm.reproduce.run import plan_experiment, run_experiment
from distlm.runtime.rundir import RunDir

TINY = (
    "shards.vocabulary_size=80", "shards.row_tokens=16", "shards.chunk_rows=4", "shards.shard_text=3000",
    "plm.layers=3", "plm.width=16", "plm.heads=2", "plm.ffn_width=32", "plm.max_positions=16", "memory.sub_keys=4",
    "memory.k=2", "memory.key_width=8", "train.updates=4", "train.valid_every=2", "train.save_every=2",
    "train.warmup_updates=1", "train.blocks_per_update=4", "train.micro_blocks=4", "launch.ranks=1", "launch.threads=1",
)  # fmt: skip

FAST = [word for word in readable([*TINY, "model.kind=plm"]) if word != "model.kind=plm"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the tests' other starts, for what an experiment starts."""
    for name in ("PYTHONPATH", warm.VARIABLE):
        monkeypatch.setenv(name, ENVIRONMENT[name])


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
        only, given = ["sweep-n64-h1-k32", "pkm"], {"books": str(books)}
        more = [*FAST, *settings]
        return run_experiment(load_experiment("pkm-plm", tmp_path / "runs", given, more, only, "scarce-quick"))

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
    for column in (3, 4):
        assert sum(int(line[column]) for line in stale if line[:2] == ["pkm", "2"]) == 16
    # FAST makes them 4² slots, of which each token reads one first with the sweep's single head.
    tokens = json.loads((root / "sweep-n64-h1-k32" / "lm.json").read_text("utf-8"))["splits"]["valid"]["text_tokens"]
    (sweep,) = (line for line in lines_of(root / "sweep.csv") if (line["text"], line["layer"]) == ("valid", "2"))
    assert sweep["slots"] == "16" and float(sweep["reads_a_slot"]) == tokens / 16 > 1
    # Of the start that was stopped and of the one that went on.
    assert len(list(RunDir(root / "sweep-n64-h1-k32").metrics.read("reproduce"))) == 2
    took = {line["run"]: float(line["processor_seconds"]) for line in lines_of(root / "processor.csv")}
    assert took.keys() == {"rows", "sweep-n64-h1-k32", "pkm"} and min(took.values()) > 0
    record = ExperimentResults.read(root / "results.json")
    assert record.path == "Memory in masked models" and [table.title for table in record.tables] == [
        "use of PKM's memories after a short training, over slots and reads",
        "perplexity of masked tokens, and use of the memories",
        "slots by when they were last read first, and last read at all",
        "processor time, all starts of a run together",
    ]
    assert record.tables[1].rows[0][:2] == ["pkm", 4] and found["splits"]["valid"]["perplexity"] in numbers(record)
    # That the first call stopped is not of it.
    (command,) = record.commands
    assert command.startswith("distlm reproduce pkm-plm books=/path/to/books ")
    assert command.endswith(" --scale scarce-quick")
    assert str(tmp_path) not in (root / "results.json").read_text("utf-8")
    code = json.loads((root / "pkm" / "code.json").read_text("utf-8"))
    assert record.commit == code["git"] and f"as data: {root / 'results.json'}" in shown
    # It is one that the page can be made of.
    assert "## Memory in masked models" in page({"pkm-plm": record})
    for name in ("curve.png", "staleness.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG")


def test_several_at_once_write_logs_and_a_failure_names_its_own(tmp_path: Path, books: Path) -> None:
    def shard(name: str, text: Path) -> Item:
        folder = tmp_path / "runs" / name
        place = (f"name={name}", f"run_dir={folder}", f"shards.text_dir={text}")
        return Item(name, "data shard", "plm-small", folder, (*place, *FAST), ())

    items = shard("one", books), shard("two", tmp_path / "nowhere")
    experiment = Experiment("x", "title", tmp_path / "runs", "distlm.analysis.papers.pkm_plm", items, "distlm x")
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


@pytest.mark.slow
def test_the_sweep_of_the_regularised_model_ends_in_its_tables(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every stage of two small runs on tiny text, and the reports over them."""
    text = write_text(tmp_path / "text")
    given = {"text": str(text), "weights": "[0]", "seeds": "[1]", "queue_weights": "[1]"}
    tiny = [*(setting for setting in TINY_KNN if not setting.startswith("name=")), "knn.search=brute", "launch.ranks=1"]
    assert run_experiment(load_experiment("regularized-knnlm", tmp_path / "runs", given, tiny)) == EXIT_DONE
    shown, table = capfd.readouterr().out, (tmp_path / "runs" / "table.md").read_text("utf-8")
    assert "| L2, ω = 0" in table and "| queues, ω = 1" in table and table.splitlines()[0] in shown
    assert (tmp_path / "runs" / "figure1.png").exists()
    for name in ("frequency", "clusters"):
        with pytest.raises(SystemExit) as end:
            main(["report", name, *(str(tmp_path / "runs" / run) for run in ("w0-s1", "queue-w1-s1"))])
        assert end.value.code == 0
        assert (tmp_path / "runs" / "w0-s1" / f"{name}-valid.png").exists()


@pytest.mark.parametrize("name", ["regularized-knnlm", "awd-lstm", "causal-pkm"])
@pytest.mark.parametrize("made", [False, True])
def test_tables_before_any_run_are_an_error(
    name: str, made: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"text={write_text(tmp_path / 'text')}"]
    if made:
        (tmp_path / "into").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", name, *given, "--into", str(tmp_path / "into"), "--tables"])
    assert caught.value.code == 1
    assert f"distlm: {tmp_path / 'into'}: no run is finished yet" in capsys.readouterr().err
    assert not list(tmp_path.rglob("table*"))
