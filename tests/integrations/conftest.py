"""Runs of small models of Hugging Face, made once."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.hf.runs import Made, made_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """By name, one of support.hf.runs.SAVE."""
    return partial(made_run, tmp_path_factory)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(3)
