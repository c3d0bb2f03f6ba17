"""`distlm memory bench` on tiny models: which models it times and what it says of them; no test asserts on time."""

import pytest
import torch
from support.config import run_of
from support.present import present

from distlm.config.load import load_config
from distlm.errors import UsageError
from distlm.models.plm.config import PlmRun
from distlm.models.plm.measure import bench as memory_bench
from distlm.models.plm.measure.bench import PUBLISHED, bench_table, enlarged, run_bench


def tiny(*more: str) -> PlmRun:
    config = load_config(
        "plm-small-resm",
        ["shards.vocabulary_size=60", "plm.layers=2", "plm.width=12", "plm.heads=3", "plm.ffn_width=24",
         "plm.max_positions=16", "memory.positions=[1]", "memory.sub_keys=4", "memory.k=2", "memory.key_width=8",
         *more],
    )  # fmt: skip
    return run_of(PlmRun, config)


def test_every_model_of_table_1_is_timed_beside_the_base_model() -> None:
    found = run_bench(tiny(), tokens=8, turns=2, train_rows=2, device=torch.device("cpu"))
    assert [timed.name for timed in found] == list(PUBLISHED)
    assert [timed.layers for timed in found] == [2, 2, 2, 4, 4, 4]
    base, pkm, resm, large, large_pkm, large_resm = (timed.parameters for timed in found)
    values, keys = 16 * 12, 4 * 4 * 8 + 13 * 32 + 64
    assert resm - base == values + keys, "values, half keys, queries, norm"
    assert resm - pkm == 12 * 24 + 24 + 24 * 12 + 12, "PKM has no feed-forward network in its layer"
    assert large < large_resm and large_resm - large_pkm == 16 * 32 + 32 + 32 * 16 + 16
    assert all(timed.inference_ratio > 0 and (timed.training_s is None) == (timed.layers == 4) for timed in found)
    head, rows = bench_table(found)
    assert all(len(row) == len(head) for row in rows) and rows[2][-1] == "1.35"


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_step_in_half_precision_is_that_of_fp32(precision: str, dtype: torch.dtype) -> None:
    """Masters and values stay fp32, and the gradients that the optimizers get have lost the loss scale."""
    moments = []
    for kind in ("fp32", precision):
        torch.manual_seed(1)
        model = memory_bench._Model("base +ResM", tiny(), "resm", torch.device("cpu"), kind)
        torch.manual_seed(2)
        model.step(4, 8)
        assert model.adam is not None
        dense = torch.cat([state["exp_avg"].flatten() for state in model.adam.state.values()])
        moments.append((dense, model.model.memories[1].table.exp_avg))
    assert {parameter.dtype for parameter in model.model.parameters()} == {dtype}
    masters = present(model.adam).param_groups[0]["params"]
    assert {tensor.dtype for tensor in (*masters, model.model.memories[1].table.values)} == {torch.float32}
    for one, other in zip(*moments, strict=True):
        assert one.norm() > 0 and (one - other).norm() < 0.05 * one.norm()


def test_the_large_model_is_to_the_base_model_as_bert_large_to_bert_base() -> None:
    large = enlarged(run_of(PlmRun, load_config("plm-base-resm")))
    assert (large.plm.layers, large.plm.width, large.plm.heads, large.plm.ffn_width) == (24, 1024, 16, 4096)
    assert large.memory.positions == [8, 16]


def test_a_recipe_without_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="the recipe has no memory; take plm-base-resm"):
        run_bench(tiny("memory.kind=none"), 8, 1, 0, torch.device("cpu"))
