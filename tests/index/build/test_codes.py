"""Units of keys within a shard: encoded in any order by any rank or start, the part is what one process makes."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.index import config, one_rank, vectors, write_store

from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index import run_index_add, run_index_train
from distlm.index.build import add, blocks
from distlm.index.build.add import Adding, AddSummary, read_batches, settled
from distlm.index.build.codes import planned_units, unit_rows
from distlm.index.build.encode import Encoder
from distlm.index.build.template import Template, load_template
from distlm.index.faiss_module import write_index
from distlm.index.layout import IndexFolder, deserialise
from distlm.index.records import CodesRecord
from distlm.runtime.units.planned import efficiency
from distlm.runtime.units.rounds import rounds

ROWS = 9000


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Nine blocks to the shard, whatever is fastest for keys of this width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "PRODUCT", 1)
        yield


@pytest.fixture(scope="module", params=["IVF8,SQ8", "PCA16,IVF8,PQ4x4"])
def template(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A store of one shard and its template."""
    folder = tmp_path_factory.mktemp("template")
    write_store(folder / "datastore", vectors(ROWS), rows_per_shard=ROWS)
    settings = config(folder, factory=request.param)
    with one_rank(settings) as stage:
        run_index_train(stage)
    return settings


@pytest.fixture
def trained(template: RunConfig, tmp_path: Path) -> RunConfig:
    shutil.copytree(template.run_dir, tmp_path / "run")
    return config(tmp_path / "run", factory=template.index.factory)


def added(datastore: Datastore, shard: int, template: Template) -> Any:
    """A faiss index of this template that holds one shard's keys under their global row numbers."""
    index, first = deserialise(template.data), datastore.shards[shard].first_row
    with settled(Encoder(index, keys=datastore.rows), datastore) as encoder:
        for start, keys in read_batches(datastore.keys(shard), encoder.batch):
            encoder.add(keys, np.arange(first + start, first + start + len(keys), dtype=np.int64))
    return index


@pytest.fixture
def part(template: RunConfig, tmp_path: Path) -> bytes:
    """What one process makes of the shard without any units."""
    store = Datastore.open(Path(template.run_dir, "datastore"))
    write_index(added(store, 0, load_template(folder_of(template), store)), tmp_path / "part")
    return (tmp_path / "part").read_bytes()


def folder_of(settings: RunConfig) -> IndexFolder:
    return IndexFolder(Path(settings.run_dir, "index"))


def run(settings: RunConfig, share: str = "") -> AddSummary:
    with one_rank(replace(settings, launch=replace(settings.launch, share=share))) as stage:
        return run_index_add(stage)


class KilledError(Exception):
    pass


def killed_after(settings: RunConfig, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that encodes and records so many units, and no more."""
    original = Adding.record

    def record(adding: Adding) -> None:
        original(adding)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Adding, "record", record)
        patch.setattr(
            add, "rounds", lambda stage, label, pending, act, at_once=1: rounds(stage, label, pending, act, units)
        )
        with pytest.raises(KilledError):
            run(settings)


def only_the_part(settings: RunConfig, part: bytes) -> None:
    folder = folder_of(settings)
    assert sorted(path.name for path in folder.parts.iterdir()) == ["part-00000.index", "part-00000.json"]
    assert folder.part(0).read_bytes() == part


def test_a_killed_start_goes_on_within_the_shard(trained, part, monkeypatch):
    killed_after(trained, 4, monkeypatch)
    folder = folder_of(trained)
    assert list(CodesRecord.read(folder.parts / ".codes.json").done) == [f"0/{number}" for number in range(4)]
    assert not folder.part(0).exists()
    assert run(trained)["rows"] == ROWS - 4 * 1024
    only_the_part(trained, part)
    assert run(trained)["parts"] == 0


@pytest.mark.parametrize("lost", ["file", "short", "record", "template"])
def test_codes_count_only_with_their_file_and_record(trained, part, monkeypatch, lost):
    killed_after(trained, 4, monkeypatch)
    codes, record = (folder_of(trained).parts / name for name in (".part-00000.codes", ".codes.json"))
    if lost == "file":
        codes.unlink()
    elif lost == "short":
        codes.write_bytes(codes.read_bytes()[:-1])
    elif lost == "record":
        record.unlink()
    else:
        CodesRecord(key="0" * 32, done=CodesRecord.read(record).done).write(record)
    assert run(trained)["rows"] == ROWS
    only_the_part(trained, part)


def test_a_lost_write_is_found_and_mended(trained, part, monkeypatch):
    killed_after(trained, 4, monkeypatch)
    codes = folder_of(trained).parts / ".part-00000.codes"
    with codes.open("r+b") as stream:
        stream.seek(500)
        stream.write(bytes(np.frombuffer(stream.read(4), np.uint8) + np.uint8(1)))
    with pytest.raises(
        DistlmError, match=r"part-00000.codes: what several ranks wrote does not read back .* run the same"
    ):
        run(trained)
    assert run(trained)["rows"] == ROWS
    only_the_part(trained, part)


def test_units_in_any_order_by_several_ranks_are_one_part(trained, part):
    """As ranks encode them, whose runs end at different times."""
    folder = folder_of(trained)
    folder.parts.mkdir()
    store = Datastore.open(Path(trained.run_dir, "datastore"))
    with Adding(folder, store, load_template(folder, store), None) as adding:
        units = adding.left([0])
        assert len(units) == 9
        done: dict[str, str] = {}
        for some in (units[5:7], units[8:], units[:1], units[2:5], units[1:2], units[7:8]):
            # A rank knows nothing of what others do in the same round.
            new, added = adding.run(lambda rows: None, some)
            assert not added
            done |= new
        adding.done = done
        adding.put_together(0)
        adding.files.clear()
    only_the_part(trained, part)


def test_wikitext103_keeps_many_ranks_busy() -> None:
    import faiss

    shards = [998_400] * 103 + [390_285]
    for factory in ("IVF4096,PQ64", "PCA256,IVF4096,SQ8", "IVF4096,PQ128x4"):
        units = planned_units(faiss.index_factory(1024, factory), shards)
        assert efficiency([units], 128) > 0.97, factory
    assert unit_rows(1024, 103_225_485) == 3 * 1024 and unit_rows(8192, 9000) == 8192
