"""Recipes, overrides, precedence and the errors of a wrong configuration."""

import pytest
import yaml

from distlm.config.check import position_warnings
from distlm.config.load import config_tree, dump_config, format_help, leaf_fields, load_config, recipe_names
from distlm.errors import UsageError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrain: {updates: 7, lr: 0.5}\n", "utf-8")
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_reads_back_unchanged(name, tmp_path):
    config = load_config(name)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), "utf-8")
    assert config_tree(load_config(str(again))) == config_tree(config)


def test_precedence_is_default_then_file_then_command_line(recipe):
    config = load_config(recipe, ["train.lr=0.25"])
    assert (config.train.updates, config.train.lr, config.train.momentum) == (7, 0.25, 0.99)
    assert config.run_dir == "runs/mine"


def test_the_dumped_configuration_has_the_defaults(recipe):
    tree = yaml.safe_load(dump_config(load_config(recipe)))
    assert tree["train"]["momentum"] == 0.99
    assert {f"{section}.{key}" for section in ("train", "knn") for key in tree[section]} <= set(leaf_fields())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.update=3", ["train.update", "train.updates"]),
        ("updates=3", ["updates", "train.updates"]),
        ("train.updates=three", ["train.updates", "three", "int"]),
        ("train.updates=1.5", ["train.updates", "1.5", "int"]),
        ("train.precision=fp8", ["fp8", "fp16", "bf16"]),
        ("knn.ks=3", ["knn.ks", "list[int]"]),
        ("train.blocks_per_update=0", ["train.blocks_per_update", "0", "at least 1"]),
        ("model.dropout=1.5", ["model.dropout", "1.5"]),
        ("model.heads=7", ["model.width", "7"]),
        ("knn.k=4", ["knn.ks", "4"]),
        ("finetune.task=SST2", ["finetune.task", "SST2", "SST-2"]),
        ("finetune.seeds=[1,1]", ["finetune.seeds", "[1, 1]", "once"]),
        ("finetune.dropout=1", ["finetune.dropout", "1", "-1 for the checkpoint"]),
        ("finetune.name=../x", ["finetune.name", "../x"]),
        ("nonsense", ["nonsense", "section.key=value"]),
    ],
)
def test_a_wrong_setting_is_one_clear_usage_error(override, words):
    with pytest.raises(UsageError) as caught:
        load_config("demo", [override])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {updates: 7, lrr: 1}", ["mine.yaml", "train.lrr", "train.lr"]),
        ("train: 7", ["mine.yaml", "train"]),
        ("trian: {updates: 7}", ["mine.yaml", "trian"]),
        ("train: [", ["mine.yaml", "YAML"]),
        ("- 1", ["mine.yaml", "list"]),
        ("train: {updates: many}", ["mine.yaml", "train.updates", "many"]),
    ],
)
def test_a_wrong_file_is_named(text, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError) as caught:
        load_config(str(path))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'demo'"):
        load_config("dmo")


def test_every_setting_has_help():
    text = format_help()
    for key in leaf_fields():
        assert f"  {key} (" in text
    blank = [key for key in leaf_fields() if text.split(f"  {key} (")[1].split("\n")[1].strip() == ""]
    assert blank == []


def test_positions_beyond_the_training_length_are_warned_about_and_no_recipe_has_them():
    assert [position_warnings(load_config(name)) for name in recipe_names()] == [[]] * len(recipe_names())
    (warning,) = position_warnings(load_config("demo", ["knn.context_window=256", "knn.block=129"]))
    assert "knn.context_window + knn.block = 385" in warning and "train.tokens_per_sample=256" in warning
    assert position_warnings(load_config("demo", ["knn.context_window=256", "datastore.checkpoint=elsewhere"])) == []
