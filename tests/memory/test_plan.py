"""What strategies are predicted to cost, at the size of Kim & Jung's memory. That bytes are those really sent is tested
on ranks (tests/multiprocess/memory/test_memory_table_ranks.py)."""

import dataclasses

import pytest
from support.memory import WIDTH, backward, make, make_table, reads, settings

from distlm.memory.config import MemoryConfig
from distlm.memory.plan import Work, describe, other_ways, plan_memory

PAPER = MemoryConfig(kind="resm")
TOKENS = 16384
WORK = Work(ranks=8, tokens=TOKENS, memories=1, activation_bytes=2)


def test_every_divisor_of_ranks_and_width() -> None:
    assert [plan.columns for plan in plan_memory(PAPER, 768, WORK)] == [1, 2, 4, 8]
    assert [plan.columns for plan in plan_memory(PAPER, 20, WORK)] == [1, 2, 4]
    assert [(p.columns, p.replicas) for p in plan_memory(PAPER, 768, dataclasses.replace(WORK, ranks=6))] == [
        (1, 6), (2, 3), (3, 2), (6, 1),
    ]  # fmt: skip
    names = [plan.name for plan in plan_memory(PAPER, 768, dataclasses.replace(WORK, ranks=4))]
    assert names == ["replicated", "column × replica", "column"]
    assert plan_memory(PAPER, 768, dataclasses.replace(WORK, ranks=1))[0].name == "one rank"


def test_bytes_by_hand() -> None:
    plans = {plan.columns: plan for plan in plan_memory(PAPER, 768, WORK)}
    # For each of 7 peers: slots, weights and score gradients of 128 reads, outputs and gradients of 96 columns; and the
    # query norm's four sums over 4 · 256 channels, and the number of tokens.
    norm = 8 * (4 * 1024 + 1)
    assert plans[8].bytes == 7 * (TOKENS * (3 * 128 * 4 + 2 * 96 * 2) + 8 + 8 + norm)
    # Every copy gets everybody's reads and output gradients.
    assert plans[1].bytes == 7 * (TOKENS * (128 * 8 + 768 * 2) + 8 + norm)
    assert plans[2].sent["stash"] == 3 * 2 * TOKENS * (128 * 8 + 384 * 2)
    assert "stash" not in plans[8].sent
    assert other_ways(PAPER, 768, WORK) == {
        "dense all-reduce": 2 * 7 * 262_144 * 768 * 4 // 8,
        "sparse all-gather": 7 * TOKENS * 128 * (768 * 4 + 8),
    }


def test_what_an_update_multiplies() -> None:
    one = plan_memory(PAPER, 768, WORK)[-1].sent
    four = plan_memory(PAPER, 768, dataclasses.replace(WORK, micro_batches=4, memories=2))[-1].sent
    assert {name: four[name] / one[name] for name in one} == {
        "slots": 8, "weights": 8, "outputs": 8, "output gradients": 8, "weight gradients": 8, "finite": 2, "norms": 2,
        "norm": 8,
    }  # fmt: skip
    clipped = plan_memory(dataclasses.replace(PAPER, clip_norm=1.0), 768, WORK)[-1].sent
    assert clipped["norms"] == 96 * one["norms"]
    frozen = plan_memory(dataclasses.replace(PAPER, frozen=True), 768, WORK)[0]
    assert set(frozen.sent) == {"norm"}
    assert frozen.kept == 0
    # More slots cost nothing on the way.
    assert plan_memory(dataclasses.replace(PAPER, sub_keys=1024), 768, WORK)[-1].sent == one


@pytest.mark.parametrize(("sub_keys", "replicated", "shared"), [(512, 4.8, 0.6), (1024, 19.3, 2.4)])
def test_memory_of_two_tables(sub_keys: int, replicated: float, shared: float) -> None:
    config = dataclasses.replace(PAPER, sub_keys=sub_keys)
    plans = plan_memory(config, 768, dataclasses.replace(WORK, memories=2))
    assert plans[0].resident / 1e9 == pytest.approx(replicated, abs=0.05)
    assert plans[-1].resident / 1e9 == pytest.approx(shared, abs=0.03)


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 9])
def test_what_is_kept_is_never_more(micro_batches: int) -> None:
    table, most = make_table(), 0
    work = Work(ranks=1, tokens=12, micro_batches=micro_batches)
    (plan,) = plan_memory(settings(), WIDTH, work)
    for micro in range(micro_batches):
        backward(table, reads(micro, share=1.0))
        most = max(most, table.gradient.bytes)
    # The slots' numbers stand beside their sums.
    assert most <= plan.kept + 8 * 49
    assert micro_batches > 2 or most == plan.kept
    tables = table.values.nbytes + table.last_step.nbytes + 2 * table.values.nbytes
    assert plan.resident == tables


def test_moments_in_bf16_take_half() -> None:
    table, optimizer = make(moments="bf16")
    backward(table, reads(0))
    optimizer.update()
    (plan,) = plan_memory(table.config, WIDTH, Work(ranks=1, tokens=12))
    assert plan.resident == sum(plane.nbytes for plane in table.planes()) + table.last_step.nbytes
    assert plan.resident < 0.7 * plan_memory(settings(), WIDTH, Work(ranks=1, tokens=12))[0].resident


def test_described() -> None:
    text = describe(plan_memory(PAPER, 768, WORK), 8, other_ways(PAPER, 768, WORK))
    assert text.splitlines()[4].split() == ["*", "column", "8", "1", "220.4", "MB", "303.0", "MB", "159.4", "MB"]
    assert "dense all-reduce" in text
    assert len(text.splitlines()) == 7
