"""The choice of kernels: what is compared, when one is taken, the same on all ranks, and kept when a run goes on."""

import dataclasses
from typing import Any

import pytest
import torch

from distlm.errors import UsageError
from distlm.kernels import choice
from distlm.kernels.choice import OPERATIONS, Operation
from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.values.exchange import Exchange
from distlm.runtime.ranks.comm import SingleComm
from distlm.training.kernels import choose as module
from distlm.training.kernels.choose import agreed, choose, told
from distlm.training.kernels.compare import Compared, compare
from distlm.training.kernels.problem import OF_MEMORY, Problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Problem(tokens=3, width=20, columns=20, sub_keys=5, heads=2, k=3, key_width=4, classes=11)
QUICK = {op: Compared(op, True, 0.0, 2.0, 1.0) for op in OPERATIONS}


@pytest.fixture(autouse=True)
def nothing_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_TAKEN", {})


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """A device that is none, on which every kernel is twice as fast: the operations that were compared."""
    found: list[Operation] = []

    def as_if(operation: Operation, problem: Problem, device: torch.device) -> Compared:
        found.append(operation)
        return QUICK[operation]

    monkeypatch.setattr(module, "compare", as_if)
    monkeypatch.setattr(choice, "available", lambda: True)
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("changes", [{}, {"precision": "fp16", "moments": "bf16", "row_steps": True}], ids=str)
def test_kernels_equal_torch(operation: Operation, changes: dict[str, Any]) -> None:
    """By Triton's interpreter, on tensors of the processor."""
    from support.kernels import DEVICE

    generator = torch.get_rng_state()
    found = compare(operation, dataclasses.replace(TINY, **changes), DEVICE, repeats=1)
    assert found.equal and not found.error and found.torch_seconds > 0 and found.triton_seconds > 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert choice._TAKEN == {}


def test_a_wrong_kernel_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.kernels import DEVICE

    from distlm.kernels import bags

    original = bags.token_sums
    monkeypatch.setattr(bags, "token_sums", lambda *x: original(*x) * 1.01)
    found = compare("lookup", TINY, DEVICE, repeats=1)
    assert not found.equal and 0.005 < found.difference < 0.02
    assert "torch does lookup (differs by 0.01)" in told([[found]], [])
    monkeypatch.setattr(bags, "token_sums", lambda *x: original(*x) * torch.nan)
    assert not compare("lookup", TINY, DEVICE, repeats=1).equal


def test_a_kernel_that_fails_leaves_the_work_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.kernels import DEVICE

    from distlm.kernels import bags

    def fail(*_: object) -> None:
        raise RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr(bags, "score_gradients", fail)
    found = compare("weights", TINY, DEVICE, repeats=1)
    assert not found.equal and found.error == "RuntimeError: PassManager::run failed"
    assert agreed([[found]], True) == []
    assert told([[found]], []) == (
        "kernels: Triton does nothing; torch does weights (RuntimeError: PassManager::run failed)"
    )
    assert choice._TAKEN == {}


def test_all_ranks_agree() -> None:
    """The times are rank 0's; one rank where it differs or fails is enough against a kernel."""
    slow, wrong = Compared("update", True, 0.0, 1.0, 1.0), Compared("slots", False, 1.0, 2.0, 1.0)
    ranks = [
        [QUICK["lookup"], QUICK["weights"], slow, QUICK["slots"]],
        [Compared("lookup", True, 0.0, 1.0, 9.0), Compared("weights", error="gone"), QUICK["update"], wrong],
    ]
    assert agreed(ranks, slower=False) == ["lookup"]
    assert agreed(ranks, slower=True) == ["lookup", "update"]
    assert told(ranks, ["lookup"]) == (
        "kernels: Triton does lookup (2.00 times as fast); torch does weights (gone), update (1.00 times as fast), "
        "slots (differs by 1)"
    )


def test_auto_compares_once(compared: list[Operation], capsys: pytest.CaptureFixture[str]) -> None:
    assert choose("auto", None, TINY, CUDA, SingleComm()) == [*OPERATIONS]
    assert compared == [*OPERATIONS] and all(choice.taken(op, CUDA) for op in OPERATIONS)
    assert not choice.taken("lookup", CPU)
    assert "kernels: Triton does lookup (2.00 times as fast), weights" in capsys.readouterr().err


def test_a_model_without_memory_compares_its_softmax(compared: list[Operation]) -> None:
    found = choose("auto", None, dataclasses.replace(TINY, memory=False), CUDA, SingleComm())
    assert found == compared == [op for op in OPERATIONS if op not in OF_MEMORY] != []


def test_a_resumed_run_keeps_its_kernels(compared: list[Operation]) -> None:
    assert choose("auto", ["update"], TINY, CUDA, SingleComm()) == ["update"]
    assert choose("auto", [], TINY, CUDA, SingleComm()) == []
    assert compared == []
    assert choose("torch", ["update"], TINY, CUDA, SingleComm()) == []
    assert not choice.taken("update", CUDA)
    assert choose("triton", [], TINY, CUDA, SingleComm()) == [*OPERATIONS] == compared


def test_without_triton_and_without_cuda(
    compared: list[Operation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"train\.kernels=triton: there is no CUDA device; set it to auto"):
        choose("triton", None, TINY, CPU, SingleComm())
    assert choose("auto", ["update"], TINY, CPU, SingleComm()) == []
    monkeypatch.setattr(choice, "available", lambda: False)
    assert choose("auto", None, TINY, CUDA, SingleComm()) == []
    assert capsys.readouterr().err == ""
    assert choose("auto", ["update", "slots"], TINY, CUDA, SingleComm()) == []
    assert "triton is not installed; torch does update, slots" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"train\.kernels=triton: the package triton is not installed; set it to auto"):
        choose("triton", None, TINY, CUDA, SingleComm())
    assert compared == []


def test_the_problem_is_the_trainings() -> None:
    config = MemoryConfig(
        kind="resm", sub_keys=6, heads=3, k=2, key_width=8, moments="bf16", row_steps=True, values="zero"
    )
    memory = ProductKeyMemory.of(config, 24, 4, 1, Exchange.alone())
    found = Problem.of(torch.nn.Sequential(memory), 400, "fp16")
    assert found == Problem(
        columns=24, sub_keys=6, heads=3, k=2, key_width=8, moments="bf16", row_steps=True, classes=400, precision="fp16"
    )
    assert not Problem.of(torch.nn.Linear(2, 2), 10**6, "fp32").memory
