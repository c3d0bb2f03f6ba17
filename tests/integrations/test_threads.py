"""Threads that ask KnnLMs of one model at once get the same numbers, and leave the process as it was."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import write_text
from support.foreign.hf import save_gpt2
from tokenizers import Tokenizer

import distlm

RULE: dict[str, Any] = {"context_window": 16, "block": 16}
TEXT = "w1 w2 w3 w4 w5\n" * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = write_text(tmp_path_factory.mktemp("threads") / "text", train_lines=40)
    return save_gpt2(text.parent / "gpt2", text)


@contextmanager
def during_a_pass(model: Any, action: Callable[[], object]) -> Iterator[list[Any]]:
    """`action` in a thread of its own, begun in the middle of the model's next pass, which goes on when it is over or
    has waited for a while; gives its future, when it has begun."""
    begun, over = threading.Event(), threading.Event()

    def act() -> object:
        try:
            return action()
        finally:
            over.set()

    def hook(*_: object) -> None:
        if not begun.is_set():
            begun.set()
            running.append(pool.submit(act))
            over.wait(0.5)

    running: list[Any] = []
    handle = model.transformer.h[0].register_forward_hook(hook)
    with ThreadPoolExecutor(1) as pool:
        yield running
        handle.remove()
        running[0].result()


def test_passes_of_two_threads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    one, other = distlm.KnnLM(model, tokenizer), distlm.KnnLM(model, tokenizer)
    alone, threads = one.log_probs(TEXT, **RULE).lm, torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for second in (one, other):
            with during_a_pass(model, partial(second.log_probs, TEXT, **RULE)) as running:
                first = one.log_probs(TEXT, **RULE).lm
            # Dropout came back in the middle of neither.
            assert np.array_equal(first, alone) and np.array_equal(running[0].result().lm, alone)
            assert all(module.training for module in model.modules()) and not model.transformer.h[1].mlp._forward_hooks
            with ThreadPoolExecutor(1) as new:
                assert torch.get_num_threads() == new.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(threads)


def test_rows_of_two_threads_are_all_there(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    knn = distlm.KnnLM(model, Tokenizer.from_file(str(folder / "tokenizer.json")))
    with during_a_pass(model, lambda: knn.add(TEXT, block=16)):
        knn.add(TEXT, block=16)
    assert knn.rows == 2 * len(knn.ids(TEXT))
