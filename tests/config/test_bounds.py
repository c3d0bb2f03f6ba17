"""What no setting may be, whatever it means; checked of one setting of each type, and of every one that there is."""

import copy
import dataclasses
from typing import NoReturn

import pytest
from support.kinds import RECIPES

from distlm.config.bounds import check_bounds
from distlm.config.load import leaf_fields, load_config, run_classes
from distlm.config.schema import RunConfig, sections_of
from distlm.errors import UsageError


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.lr=.nan", "must be a finite number"), ("train.lr=.inf", "must be a finite number"),
        ("knn.lambdas=[0.1,.nan]", "must be a finite number"), ("train.lr=1e39", "infinite in single precision"),
        ("train.adam_eps=1e-40", "is 0 in single precision"), ("model.layers=null", "is null"),
        ("train.updates=9007199254740993", "must be at most 9007199254740992"),
        ("train.seed=-1", "a seed is from 0 to"),
        ("index.seed=2147483648", "a seed is from 0 to"), ("data.text_dir=a\0b", "control character"),
        ("data.text_dir=a\nb", "control character"), ("data.text_dir=a\udcffb", "is not UTF-8"),
        ("knn.extra_runs=[\"a\\nb\"]", "control character"), (f"data.text_dir={'x' * 5000}", "has 5000 characters"),
        ("model.cutoffs=[1]", "must be rising numbers above 1"),
        ("model.layers=1001", "must be at most 1000"), ("model.width=1048584", "must be at most 1048576"),
        ("memory.heads=1048577", "must be at most 1048576"),
    ],
)  # fmt: skip
def test_a_value_that_nothing_can_compute_with(setting: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config("demo", [setting])
    text, key = str(caught.value), setting.partition("=")[0]
    assert text.startswith(f"command line: {key}=") and words in text and len(text) < 500 and "\n" not in text


def _raise(key: str, value: object, mend: str) -> NoReturn:
    raise UsageError(f"{key}={value}: {mend}")


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_is_looked_at(name: str) -> None:
    loaded = load_config(RECIPES[name])
    check_bounds(loaded, _raise)
    for key in leaf_fields(run_classes()[name]):
        config = copy.deepcopy(loaded)
        section, _, field = key.rpartition(".")
        setattr(getattr(config, section) if section else config, field, None)
        with pytest.raises(UsageError, match=rf"^{key}=None: is null"):
            check_bounds(config, _raise)


@pytest.mark.parametrize("name", RECIPES)
def test_a_list_is_checked_entry_by_entry(name: str) -> None:
    config: RunConfig = load_config(RECIPES[name])
    for section in sections_of(type(config)):
        for item in dataclasses.fields(getattr(config, section)):
            before = getattr(getattr(config, section), item.name)
            if isinstance(before, list):
                setattr(getattr(config, section), item.name, [*before, float("nan")])
                with pytest.raises(UsageError, match=rf"{section}\.{item.name}"):
                    check_bounds(config, _raise)
                setattr(getattr(config, section), item.name, before)


def test_a_piece_of_a_tokenizer_may_be_a_line_feed() -> None:
    assert load_config("hf", ["data.line_end=\n"]).data.line_end == "\n"


def test_an_error_names_where_a_setting_stands(tmp_path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("base: demo\nknn:\n  k: 0\n", "utf-8")
    with pytest.raises(UsageError, match=rf"^{recipe}: knn\.k=0: must be at least 1"):
        load_config(str(recipe))
    with pytest.raises(UsageError, match=r"^command line: knn\.nprobe=0: "):
        load_config(str(recipe), ["knn.k=1", "knn.nprobe=0"])
