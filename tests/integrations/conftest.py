"""Runs of small models of Hugging Face, made once."""

from collections.abc import Callable

import pytest
import torch
from support.hf.runs import Made, make_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """By name, one of support.hf.runs.SAVE."""
    kept: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in kept:
            kept[name] = make_run(name, tmp_path_factory.mktemp(f"knn-{name}"))
        return kept[name]

    return make


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(3)
