"""The plan: what it adds up, what it measures, and what it says before there is any data."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.index import config, one_rank, vectors, write_store

from distlm.config import load_config
from distlm.errors import DistlmError
from distlm.index import run_index_build
from distlm.index.choose import calibrate as calibration
from distlm.index.choose.calibrate import Amounts, calibrate
from distlm.index.choose.cost import index_costs
from distlm.index.choose.plan import Store, add_units, store_of, template_bytes
from distlm.index.factory import fit_factory
from distlm.index.records import Rates
from distlm.plan_sheet import plan_sheet
from distlm.runtime.files import format_bytes

RATES = Rates(
    threads=2, add_keys_s=20_000, kmeans_keys_s=10_000, pq_s=15, transform_keys_s=None,
    transform_fixed_s=0, write_bytes_s=1e9, read_bytes_s=2e9, merge_bytes_s=4e8,
)  # fmt: skip


def test_costs_are_what_the_rates_give() -> None:
    factory = fit_factory("IVF4096,PQ64", 1024, 103_225_485, 1_048_576)
    store = Store(103_225_485, 1024, 104, written=False)
    one, many = (index_costs(factory, store, RATES, ranks) for ranks in (1, 32))
    assert [cost.stage for cost in one] == ["index train", "index add", "index merge"]
    sample, keys = 1_048_576 * 2048, 103_225_485 * 2048
    assert one[0].read_bytes == keys + sample
    assert one[0].seconds == pytest.approx((keys + sample) / 2e9 + 10 * 1_048_576 / 10_000 + 15)
    # The codebooks are 64 units of work, the keys of k-means any number.
    # Of 104 shards one of 32 ranks reads four.
    assert many[0].seconds == pytest.approx((keys * 4 / 104 + sample) / 2e9 + 10 * 1_048_576 / 10_000 / 32 + 15 / 32)
    assert one[0].network_bytes == 0 and many[0].network_bytes == 32 * (160 * 4096 * 1024 + 4096 * 65536)
    assert many[0].memory_bytes < one[0].memory_bytes / 2
    parts = 103_225_485 * 72 + 104 * template_bytes(factory)
    assert one[1].read_bytes == 103_225_485 * 2048 and one[1].written_bytes == parts
    codes = 103_225_485 * 72
    assert one[1].seconds == pytest.approx(103_225_485 / 20_000 + (parts + codes) / 1e9, rel=1e-3)
    # 12,699 units of 8,192 keys on 32 ranks are 397 turns; 104 parts are four.
    assert add_units(factory, store) == 104 * 122
    assert many[1].seconds == pytest.approx(103_225_485 / 20_000 * 397 / 12_688 + (parts + codes) / 1e9 * 4 / 104)
    assert many[1].read_rate == pytest.approx(many[1].read_bytes / many[1].seconds)
    assert one[2].seconds == many[2].seconds == pytest.approx((103_225_485 * 72 + template_bytes(factory)) / 4e8 + 0.1)


def test_keys_of_four_bytes_are_read_and_held_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half, whole = (Store(103_225_485, 1024, 104, written=True, item=item) for item in (2, 4))
    factory = fit_factory("IVF4096,PQ64", 1024, half.rows, 1_048_576)
    of_half, of_whole = (index_costs(factory, store, RATES, 1) for store in (half, whole))
    assert [a.read_bytes for a in of_whole[:2]] == [2 * a.read_bytes for a in of_half[:2]]
    assert of_whole[0].seconds - of_half[0].seconds == pytest.approx(of_half[0].read_bytes / RATES.read_bytes_s)
    assert of_whole[0].memory_bytes - of_half[0].memory_bytes == 2 * 1_048_576 * 1024
    # As a store says that is there, and as the settings say where none is.
    settings = config(tmp_path / "to_come", "datastore.key_dtype=float32", factory="IVF32,PQ8")
    write_store(tmp_path / "written" / "datastore", vectors(6000).astype(np.float32))
    stores = [store_of(of) for of in (settings, config(tmp_path / "written"))]
    assert [(store.item, store.written) for store in stores if store] == [(4, False), (4, True)]
    monkeypatch.setattr("distlm.plan_sheet.calibrate", lambda *_: RATES)
    sheet = plan_sheet(settings, [1], 1_000_000, None)
    add = next(line for line in sheet.splitlines() if line.startswith("index add"))
    width = int(re.findall(r"keys × (\d+),", sheet)[0])
    assert format_bytes(4 * 1_000_000 * width) in add


@pytest.mark.parametrize("factory", ["IVF32,PQ4", "PCA16,IVF32,SQ8", "OPQ4_16,IVF32,PQ4x4", "IVF32,RaBitQ"])
def test_any_factory_can_be_measured(factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "READ_PIECE", 1 << 18)
    few = Amounts(kmeans_keys=2000, transform_keys=(300, 600), add_s=0.05, disk_bytes=1 << 20)
    told: list[str] = []
    rates = calibrate(fit_factory(factory, 32, 50_000, 50_000), tmp_path, told.append, few)
    assert told == ["transforms", "k-means", "adding", "disk", "merging"]
    assert min(rates.add_keys_s, rates.kmeans_keys_s, rates.write_bytes_s, rates.read_bytes_s, rates.merge_bytes_s) > 0
    assert (rates.pq_s > 0) == ("PQ" in factory.split(",")[-1])
    assert (rates.transform_keys_s is not None) == (factory[0] in "PO")
    assert not list(tmp_path.iterdir())


def test_the_sheet_counts_what_the_stages_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.plan_sheet.calibrate", lambda *_: RATES)
    write_store(tmp_path / "datastore", vectors(6000))
    settings = config(tmp_path, factory="IVF32,PQ8")
    sheet = plan_sheet(settings, [1, 2], 0, tmp_path / "rates.json")
    assert "index: 6000 keys × 32, IVF32,PQ8, 16 bytes/key, 4 shards" in sheet and sheet.count("index add") == 3
    # One block of keys in each shard: two ranks are busy, and of 1,024 ranks four.
    busy = next(line.split() for line in sheet.splitlines() if re.match(r"index add +4 +1.000", line))
    assert busy[4] == "1.000" and busy[-1] == "0.004"
    with one_rank(settings) as stage:
        run_index_build(stage)
    factory = fit_factory("IVF32,PQ8", 32, 6000, settings.index.sample)
    costs = index_costs(factory, Store(6000, 32, 4, written=True), RATES, 1)
    written = [sum(path.stat().st_size for path in (tmp_path / "index").glob(pattern))
               for pattern in ("template.index", "parts/*.index", "merged.index")]  # fmt: skip
    assert written == pytest.approx([cost.disk_bytes for cost in costs], rel=0.02)
    with pytest.raises(DistlmError, match=r"rates.json: measured for IVF32,PQ8"):
        plan_sheet(config(tmp_path, factory="IVF32,SQ8"), [1], 0, tmp_path / "rates.json")


def test_a_recipe_is_planned_before_its_text_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlm.plan_sheet.calibrate", lambda *_: RATES)
    settings = load_config("wikitext103", [f"run_dir={tmp_path}"])
    assert "give --rows" in plan_sheet(settings, [8], 0, None)
    sheet = plan_sheet(settings, [1, 8, 32], 103_225_485, None)
    assert (
        "not known yet: data.text_dir is empty" in sheet
        and len(re.findall(r"index merge +\d+ +7\.[45] GB", sheet)) == 3
    )
