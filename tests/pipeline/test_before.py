"""What a whole `distlm run` cannot do is said before its first stage, and its plan is that of its text."""

from pathlib import Path

import pytest
from support import distlm, shared, write_text
from support.disk import small_disk

from distlm import pipeline
from distlm.config.load import load_config
from distlm.data import estimate
from distlm.data.estimate import expected_tokens
from distlm.errors import DistlmError, UsageError
from distlm.knnlm.plan import plan_evaluate, plan_search, plan_tune
from distlm.pipeline import plan_pipeline, plan_step, steps_of
from distlm.runtime.plan import StagePlan


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("index.factory=IVFF64,PQ16", "index.factory='IVFF64,PQ16': faiss cannot build it for width 192"),
        ("index.factory=IVF0,Flat", "an index needs at least one list"),
        ("index.factory=IVF64,PQ7", "PQ7 does not divide the key width 192"),
        ("train.tap=foo", "train.tap='foo': no such hidden state"),
        ("datastore.tap=foo", "datastore.tap='foo': no such hidden state"),
        ("train.deepspeed=nosuch", "train.deepspeed=nosuch"),
        ("data.tokenizer=/nosuch", "data.tokenizer=/nosuch"),
        ("knn.k=10000000", "knn.k=10000000: the datastore has about 47"),
        ("launch.ranks=7", "ranks"),
    ],
)
def test_what_a_later_stage_cannot_do_is_said_before_the_first(setting, said, tmp_path):
    run = tmp_path / "run"
    refused = distlm("run", "demo", f"run_dir={run}", setting, check=False)
    assert refused.returncode in (1, 2) and said in refused.stderr, refused.stderr
    assert not run.exists(), "nothing was begun"


def test_what_an_earlier_start_has_written_takes_no_room_again(tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = load_config("demo", [f"run_dir={run}"])
    plans = [StagePlan(stage, "", 1000, 0, 0.0) for stage in ("datastore write", "index build")]
    monkeypatch.setattr(pipeline, "check_settings", lambda config: plans)
    (run / "datastore").mkdir(parents=True)
    (run / "datastore" / ".keys-00000.npy.part").write_bytes(bytes(800))
    small_disk(monkeypatch, run, 2050)
    pipeline._check_before(config)
    small_disk(monkeypatch, run, 1950)
    with pytest.raises(DistlmError, match=r"`distlm run` \(datastore write, index build\) needs 1.2 kB"):
        pipeline._check_before(config)


def test_evaluation_tokens_are_those_of_their_files(tmp_path, monkeypatch):
    """103 M tokens with WikiText's own valid and test: a tenth of train was assumed, and 123 GB of disk asked for."""
    text = write_text(tmp_path / "text")
    config = load_config("wikitext103", [f"data.text_dir={text}", f"run_dir={tmp_path / 'run'}"])
    sizes = {"train": 541_000_000, "valid": 1_140_000, "test": 1_290_000}
    monkeypatch.setattr(estimate, "text_bytes", lambda sources: sizes[sources[0].path.stem])
    found = expected_tokens(config)
    assert not found.exact
    share = {split: found.tokens[split] / found.tokens["train"] for split in sizes}
    assert share["valid"] == pytest.approx(1_140 / 541_000, rel=0.01)
    config.index.factory = "IVF4096,PQ64"
    assert plan_search(config, 8).disk_bytes < 60e9


def test_token_files_count_exactly_and_a_share_is_a_share(tmp_path_factory, tmp_path):
    run = shared.searched(tmp_path_factory)
    assert expected_tokens(run).exact and expected_tokens(run).tokens == {"train": 4343, "valid": 546, "test": 560}
    text = write_text(tmp_path / "text")
    estimated = expected_tokens(
        load_config("demo", [f"run_dir={tmp_path}", "data.source=folder", f"data.text_dir={text}"])
    )
    assert not estimated.exact
    for split, tokens in {"train": 4343, "valid": 546, "test": 560}.items():
        assert estimated.tokens[split] == pytest.approx(tokens, rel=0.15)
    for split in ("valid", "test"):
        (text / f"{split}.txt").unlink()
    shares = ["data.valid_share=0.2", "data.test_share=0.1", "data.documents=line"]
    cut = expected_tokens(
        load_config("demo", [f"run_dir={tmp_path}", "data.source=folder", f"data.text_dir={text}", *shares])
    )
    assert cut.tokens["valid"] == pytest.approx(2 * cut.tokens["test"], rel=0.01)
    assert sum(cut.tokens.values()) == pytest.approx(4343, rel=0.15)


def test_stages_have_their_own_names_and_finished_ones_say_so(tmp_path_factory, tmp_path):
    config = load_config("demo", [f"run_dir={tmp_path / 'none'}"])
    assert [plan_step(step, config).stage for step in steps_of(config)] == [step.words for step in steps_of(config)]
    tune, evaluate, search = (plan(config, 1) for plan in (plan_tune, plan_evaluate, plan_search))
    assert tune.disk_bytes < evaluate.disk_bytes < search.disk_bytes
    run = shared.searched(tmp_path_factory)
    lines = plan_pipeline(run, "demo", []).splitlines()
    assert sum(line.endswith("finished; nothing to do") for line in lines) == 7
    config.data.source = "hub"
    unknown = plan_pipeline(config, "demo", [])
    assert unknown.count("disk unknown, memory/rank unknown, time unknown") == 6 and "disk 0 B" not in unknown


def test_more_lists_than_there_are_is_a_word_and_more_neighbours_than_rows_a_refusal(tmp_path_factory):
    run = shared.searched(tmp_path_factory)
    asked = load_config(str(Path(run.run_dir)), ["knn.nprobe=500", "knn.k=4000"])
    assert any("knn.nprobe=500 is more than the 16 lists" in note for note in plan_search(asked, 1).notes)
    asked.knn.k = 4312
    with pytest.raises(UsageError, match=r"knn.k=4312: the datastore has 4311 rows"):
        plan_search(asked, 1)
