"""launch.share: independent processes add shares of the parts; the run after them completes and merges the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.index import config, one_rank, vectors, write_store

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, UsageError
from distlm.index import run_index_add, run_index_merge, run_index_train
from distlm.index.build.add import AddSummary
from distlm.runtime.lock import only_writer


@pytest.fixture
def trained(tmp_path: Path) -> RunConfig:
    """A store of 7 shards and its template."""
    write_store(tmp_path / "datastore", vectors(10_000), rows_per_shard=1500)
    settings = config(tmp_path, factory="IVF8,SQ8")
    with one_rank(settings) as stage:
        run_index_train(stage)
    return settings


def add(settings: RunConfig, share: str = "") -> AddSummary:
    with one_rank(replace(settings, launch=replace(settings.launch, share=share))) as stage:
        return run_index_add(stage)


def merged(settings: RunConfig) -> bytes:
    with one_rank(settings) as stage:
        run_index_merge(stage)
        return stage.run.index.joinpath("merged.index").read_bytes()


def parts(settings: RunConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(settings.run_dir, "index", "parts").iterdir())}


def test_shares_then_a_run_leave_the_bytes_of_one_run(trained: RunConfig, tmp_path_factory: pytest.TempPathFactory):
    assert add(trained, "1/3")["parts"] == 2
    assert sorted(parts(trained)) == [f"part-0000{i}.{end}" for i in (1, 4) for end in ("index", "json")]
    assert add(trained, "0/3")["parts"] == 3
    assert add(trained, "0/3")["parts"] == 0
    with pytest.raises(DistlmError), one_rank(trained) as stage:
        run_index_merge(stage)
    assert add(trained)["parts"] == 2, "share 2/3 never ran"
    alone = config(tmp_path_factory.mktemp("alone"), factory="IVF8,SQ8")
    write_store(Path(alone.run_dir, "datastore"), vectors(10_000), rows_per_shard=1500)
    with one_rank(alone) as stage:
        run_index_train(stage)
    add(alone)
    assert parts(trained) == parts(alone)
    assert merged(trained) == merged(alone)


def test_a_share_and_a_run_keep_each_other_out(trained: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.runtime.lock._PATIENCE_S", 0.1)
    with one_rank(trained) as stage:
        for work in ("adding to this index", "merging this index"):
            with (
                only_writer(stage.run.index, stage.comm, work),
                pytest.raises(DistlmError, match=rf"another run is {work} here \(.*pid \d+ on "),
            ):
                add(trained, "0/2")
        add(trained, "0/2")


def test_one_run_at_a_time_trains_and_merges(trained: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.runtime.lock._PATIENCE_S", 0.1)
    add(trained)
    with one_rank(trained) as stage:
        held = only_writer(stage.run.index, stage.comm, "writing this index")
        with held, pytest.raises(DistlmError, match=r"another run is writing this index here \(.*pid \d+ on "):
            run_index_merge(stage)
        run_index_merge(stage)
        with only_writer(stage.run.index, stage.comm, "writing this index"):
            # A finished step does not need the lock: its folder may be read-only.
            assert run_index_train(stage)["done_before"] and run_index_merge(stage)["done_before"]
            (stage.run.index / "template.json").unlink()
            with pytest.raises(DistlmError, match="another run is writing this index here"):
                run_index_train(stage)


@pytest.mark.parametrize("step", ["train", "merge"])
def test_what_another_run_finished_meanwhile_is_not_done_again(
    trained: RunConfig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The other one ends while this one waits for its lock; a merge has removed the parts then."""
    template = Path(trained.run_dir, "index", "template.json")
    kept = template.read_bytes()
    add(trained)
    alone = replace(trained, index=replace(trained.index, keep_parts=False))

    @contextmanager
    def late(*arguments: Any) -> Iterator[None]:
        monkeypatch.undo()
        template.write_bytes(kept)
        if step == "merge":
            with one_rank(alone) as other:
                run_index_merge(other)
        with only_writer(*arguments):
            yield

    run = {"train": run_index_train, "merge": run_index_merge}[step]
    monkeypatch.setattr(f"distlm.index.{'build.template' if step == 'train' else 'merge.stage'}.only_writer", late)
    if step == "train":
        template.unlink()
    with one_rank(alone) as stage:
        assert run(stage)["done_before"]


def test_temporary_files_of_another_share_stay(trained: RunConfig) -> None:
    folder = Path(trained.run_dir, "index", "parts")
    folder.mkdir()
    theirs, own = (folder / f".part-0000{part}.index.node7.9.tmp" for part in (1, 2))
    theirs.touch()
    own.touch()
    add(trained, "0/2")
    assert theirs.exists() and not own.exists()
    add(trained)
    assert not theirs.exists()


def test_a_bad_share_is_refused(trained: RunConfig) -> None:
    with pytest.raises(UsageError, match=r"launch\.share=2/2"):
        add(trained, "2/2")
