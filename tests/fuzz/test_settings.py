"""Every setting of every kind of model with every sort of value: refused in one line, or what it asks for is done."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import command, has_manners, inside, times
from support.fuzz.runs import FINETUNE, Base, bases, ready_for
from support.fuzz.values import words_for

from distlm.config.load import leaf_fields, load_config
from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.runtime.plan import StagePlan
from distlm.verbs import STAGE_VERBS

NAMES = ("transformer", "memory", "lstm", "hf", "hf_memory", "plm", "tuned")
_STAGE_OF = {
    "data": ("data prepare",), "model": ("train",), "lstm": ("train",), "awd": ("train",), "hf": ("train",),
    "plm": ("train",), "memory": ("train",), "shards": ("data shard",), "datastore": ("datastore write",),
    "index": ("index build",), "knn": ("knn search", "knn tune", "knn evaluate"), "cache": ("knn cache", "knn tune"),
    "finetune": ("finetune",),
}  # fmt: skip
"""Section → the stages that read it; others are read by all."""
MOST_MEMORY, MOST_DISK, MOST_S = 500_000_000, 500_000_000, 60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    """Name → Base, made when it is asked for."""
    makers = bases(tmp_path_factory)
    return cache(lambda name: makers[name]())


@st.composite
def changes(draw: st.DrawFn, base: Base) -> dict[str, str]:
    """One or two settings with values."""
    known = leaf_fields(type(base.config))
    keys = [key for key in known if not base.sections or key.partition(".")[0] in base.sections]
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2, unique=True))
    return {key: draw(words_for(known[key])) for key in chosen}


def looks(data: st.DataObject, base, folder: Path, names: Sequence[str] = NAMES) -> None:
    """What only looks: the configuration, and the plan of a stage."""
    found = base(data.draw(st.sampled_from(names)))
    changed = data.draw(changes(found))
    whole = [] if FINETUNE in found.verbs else ["run --dry-run"]
    plans = [f"{verb} --dry-run" for verb in found.verbs]
    verb = data.draw(st.sampled_from(["config", "config --diff", *whole, *plans]))
    with inside(folder):
        has_manners(
            command(*verb.split(), found.recipe, *(f"{key}={value}" for key, value in changed.items())), [*changed]
        )


def works(data: st.DataObject, base, folder: Path) -> None:
    """The stage that reads a setting, for real, where its plan says that it is small."""
    found = base(data.draw(st.sampled_from(NAMES)))
    changed = data.draw(changes(found))
    readers = [verb for verb in _STAGE_OF.get(next(iter(changed)).partition(".")[0], ()) if verb in found.verbs]
    verb = data.draw(st.sampled_from(readers or [verb for verb in found.verbs if not verb.endswith("-only")]))
    run = ready_for(verb, found, folder / "run")
    words = [*({"run_dir": str(run)} | changed).items()]
    settings = [f"{key}={value}" for key, value in words]
    with inside(folder / "here"):
        short = _short(found.recipe, settings, verb)
        if short is not None:
            has_manners(command(*verb.split(), found.recipe, *settings, *short), [*changed], stopped=True)


def _short(recipe: Path, settings: list[str], verb: str) -> list[str] | None:
    """Settings that end a training early; None: this is more than a test can do."""
    try:
        config = load_config(str(recipe), settings)
        plan = _plan(config, verb)
    except DistlmError:
        return []
    if plan.memory_bytes > MOST_MEMORY or plan.disk_bytes > MOST_DISK or (plan.seconds or 0) > MOST_S:
        return None
    section = "finetune" if verb == "finetune" else "train"
    return [f"{section}.max_updates_this_run=3"] if verb in ("train", "finetune") else []


def _plan(config: RunConfig, verb: str) -> StagePlan:
    place = next(found.plan for found in STAGE_VERBS if found.words == verb)
    module, _, name = place.partition(":")
    planned: Any = getattr(import_module(module), name)
    found: StagePlan = planned(config, 1)
    return found


@times(40)
@given(data=st.data())
def test_what_only_looks(data: st.DataObject, base, tmp_path_factory: pytest.TempPathFactory) -> None:
    # Those that are quickly made.
    looks(data, base, tmp_path_factory.getbasetemp() / "fuzz-here", ("transformer", "memory", "lstm", "plm", "tuned"))


@pytest.mark.slow
@times(900)
@given(data=st.data())
def test_what_only_looks_at_length(data: st.DataObject, base, tmp_path_factory: pytest.TempPathFactory) -> None:
    looks(data, base, tmp_path_factory.getbasetemp() / "fuzz-here")


@pytest.mark.slow
@times(300)
@given(data=st.data())
def test_stages(data: st.DataObject, base, tmp_path_factory: pytest.TempPathFactory) -> None:
    works(data, base, tmp_path_factory.getbasetemp() / "fuzz-stages")
