"""index.factory=auto: what the rules choose, that it can be built, and that it stays what it was."""

from pathlib import Path

import pytest
from support.index import config, one_rank, vectors, write_store

from distlm.config import load_config
from distlm.config.schema import IndexConfig
from distlm.errors import DistlmError, UsageError
from distlm.index import run_index_build
from distlm.index.choose import auto
from distlm.index.choose.auto import Chosen, choose, resolve
from distlm.index.choose.plan import plan_index, template_bytes
from distlm.index.factory import KEYS_PER_LIST, fit_factory
from distlm.index.records import ChosenFactory, IndexRecord, TemplateRecord
from distlm.runtime.question import index_name


@pytest.mark.parametrize("rows", [1, 40, 5000, 180_000, 2_000_000, 103_225_485])
@pytest.mark.parametrize("width", [1, 3, 32, 64, 192, 256, 768, 1024, 4096])
@pytest.mark.parametrize("most", [0, 9, 20, 40, 72, 136, 2000])
def test_whatever_is_chosen_is_within_the_limit_and_can_be_trained(rows: int, width: int, most: int) -> None:
    index = IndexConfig(max_bytes_per_key=most)
    chosen = choose(rows, width, index)
    factory = fit_factory(chosen.factory, width, rows, index.sample)
    assert factory.key_bytes <= (most or auto.DEFAULT_BYTES)
    # As it stands: nothing had to be scaled down.
    assert factory.used == chosen.factory and not factory.messages
    assert factory.nlist == 1 or factory.nlist * KEYS_PER_LIST <= min(rows, index.sample)
    # The bytes are used, where the width has a bit for each.
    assert factory.code_size >= min(width / 8, (most or auto.DEFAULT_BYTES) - 8)
    assert len(chosen.why) == 2 and str(rows) in chosen.why[1]


def test_memory_is_a_limit_for_all_keys_together() -> None:
    rows = 1_000_000
    for gigabytes in (0.04, 0.08, 0.5):
        factory = fit_factory(choose(rows, 1024, IndexConfig(max_memory=gigabytes)).factory, 1024, rows, 1 << 20)
        assert factory.key_bytes * rows + template_bytes(factory) <= gigabytes * 1e9
    # The smaller of two limits.
    both = choose(rows, 1024, IndexConfig(max_memory=0.5, max_bytes_per_key=40))
    assert both.factory == choose(rows, 1024, IndexConfig(max_bytes_per_key=40)).factory
    with pytest.raises(
        UsageError, match=r"index.max_memory=0.001: besides centroids 1000000 keys get 0 bytes each and"
    ):
        choose(rows, 1024, IndexConfig(max_memory=0.001))


def test_advice_about_memory_works_when_it_is_followed() -> None:
    with pytest.raises(UsageError) as caught:
        choose(123_457, 64, IndexConfig(max_memory=0.0001))
    advised = float(str(caught.value).rpartition("index.max_memory=")[2].partition(",")[0])
    assert fit_factory(choose(123_457, 64, IndexConfig(max_memory=advised)).factory, 64, 123_457, 4096).code_size >= 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("index.max_bytes_per_key=8", "an id takes 8 bytes; set at least 9, or 0"),
        ("index.max_bytes_per_key=-1", "must not be negative"),
        ("index.max_memory=-0.5", "must not be negative"),
        ("index.factory=IVF16,SQ8 index.max_memory=1", "is read with index.factory=auto alone; set it to 0"),
    ],
)
def test_limits_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config("demo", setting.split())


def test_each_limit_has_an_index_of_its_own() -> None:
    names = [index_name(IndexConfig(**limits)) for limits in ({}, {"max_bytes_per_key": 40}, {"max_memory": 2.5})]
    assert names == ["auto", "auto-40B", "auto-2.5GB"]
    assert index_name(IndexConfig(factory="IVF16,SQ8")) == "IVF16-SQ8"


def test_the_choice_is_said_kept_and_holds_when_the_rules_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "datastore", vectors(4000))
    settings = config(tmp_path, factory="auto", max_bytes_per_key=24)
    planned = plan_index(settings, 1)
    with one_rank(settings) as stage:
        run_index_build(stage)
    first = IndexRecord.read(tmp_path / "index/index.json").fingerprint
    kept = ChosenFactory.read(tmp_path / "index/choice.json")
    template = TemplateRecord.read(tmp_path / "index/template.json")
    assert kept.factory == template.factory and template.code_size <= 16
    assert (kept.rows, kept.width, kept.max_bytes_per_key, kept.max_memory) == (4000, 32, 24, 0)
    said = capsys.readouterr().err
    assert f"index.factory=auto: {kept.factory} (" in said and kept.why[0] in said
    assert kept.factory in planned.work and any(kept.why[0] in note for note in planned.notes)
    # Killed after the choice: the next start trains what the first chose, by whatever rules.
    monkeypatch.setattr(auto, "choose", lambda *_: Chosen("IVF2,Flat", ["other rules"]))
    for name in ("template.json", "index.json"):
        (tmp_path / "index" / name).unlink()
    with one_rank(settings) as stage:
        run_index_build(stage)
    assert IndexRecord.read(tmp_path / "index/index.json").fingerprint == first
    assert resolve(settings.index, 4000, 32, tmp_path / "index").factory == kept.factory
    # Of another store it says nothing.
    assert resolve(settings.index, 4001, 32, tmp_path / "index").factory == "IVF2,Flat"


def test_other_limits_for_an_index_that_is_there_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "datastore", vectors(2000))
    with one_rank(config(tmp_path, factory="auto")) as stage:
        run_index_build(stage)
    before = (tmp_path / "index/choice.json").read_bytes()
    other = one_rank(config(tmp_path, factory="auto", max_bytes_per_key=12))
    with other as stage, pytest.raises(DistlmError, match=r"trained with factory 'IVF.*', now 'PCA.*index.name="):
        run_index_build(stage)
    assert (tmp_path / "index/choice.json").read_bytes() == before
