"""What a report shows of a run's settings: those that differ from the nearest shipped recipe."""

import pytest

from distlm.analysis.against_recipe import Change, against_recipe
from distlm.config.load import dump_config, load_config
from distlm.config.recipe import recipe_names
from distlm.config.yaml_files import yaml_of


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_run_of_a_recipe_differs_in_nothing(recipe: str) -> None:
    found = against_recipe(recipe, yaml_of(dump_config(load_config(recipe, ["run_dir=elsewhere"]))))
    assert (found.recipe, found.changes) == (recipe, [])


def test_what_was_set_is_shown_beside_the_recipes_value() -> None:
    config = load_config("demo", ["name=mine", "train.lr=0.002", "knn.ks=[16,64]", "train.trackers=[tensorboard]"])
    found = against_recipe("mine", yaml_of(dump_config(config)))
    assert found.recipe == "demo"
    assert {change.setting: change for change in found.changes} == {
        "train.lr": Change("train.lr", "0.002", "0.003"),
        "knn.ks": Change("knn.ks", "[16, 64]", "[16, 64, 256]"),
        "train.trackers": Change("train.trackers", "[tensorboard]", "[]"),
    }


def test_old_runs_and_kinds_that_are_not_there_are_compared_as_far_as_they_go() -> None:
    settings = yaml_of(dump_config(load_config("demo")))
    del settings["train"]["lr"]
    settings["train"]["no_longer_there"] = 5
    assert against_recipe("demo", settings).changes == []
    settings["model"]["kind"] = "of_another_package"
    found = against_recipe("demo", settings)
    assert found.recipe == "" and "model.kind" in {change.setting for change in found.changes}
