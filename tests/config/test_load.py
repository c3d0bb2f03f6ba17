"""Recipes, overrides, precedence and the errors of a wrong configuration."""

import pytest
import yaml

from distlm.config.check import position_warnings
from distlm.config.load import (
    config_tree,
    dump_config,
    leaf_fields,
    load_config,
    run_classes,
)
from distlm.config.recipe import recipe_names
from distlm.config.settings import format_help
from distlm.config.training import UpdatesConfig
from distlm.errors import UsageError
from distlm.models.registry import kind


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
    train = config.section(UpdatesConfig)
    assert (train.updates, train.lr, train.momentum) == (7, 0.25, 0.99)
    assert config.run_dir == "runs/mine"


def test_the_dumped_configuration_has_the_defaults(recipe):
    config = load_config(recipe)
    tree = yaml.safe_load(dump_config(config))
    assert tree["train"]["momentum"] == 0.99
    assert {f"{section}.{key}" for section in ("train", "knn") for key in tree[section]} <= set(
        leaf_fields(type(config))
    )


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
        ("index.name=../x", ["index.name", "../x"]),
        ("name=", ["name=''", "the name of a folder"]),
        ("name=../x", ["name='../x'", "without /"]),
        ("name=.x", ["name='.x'", "no dot"]),
        ("name=a/b", ["name='a/b'", "without /"]),
        ("knn.extra_runs=[runs/../runs/demo]", ["knn.extra_runs", "runs/../runs/demo is the run itself"]),
        ("knn.extra_runs=[a,./a]", ["knn.extra_runs", "./a is there twice"]),
        ("knn.splits=[foo]", ["knn.splits", "'foo'", "train, valid, test"]),
        ("knn.splits=[valid,valid]", ["knn.splits", "each once"]),
        ("knn.ks=[0,4]", ["knn.ks", "at least 1"]),
        ("nonsense", ["nonsense", "section.key=value"]),
    ],
)
def test_a_wrong_setting_is_one_clear_usage_error(override, words):
    with pytest.raises(UsageError) as caught:
        load_config("demo", [override])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finetune.task=SST2", ["finetune.task", "SST2", "SST-2"]),
        ("finetune.seeds=[1,1]", ["finetune.seeds", "[1, 1]", "once"]),
        ("finetune.dropout=1", ["finetune.dropout", "1", "-1 for the checkpoint"]),
        ("finetune.name=../x", ["finetune.name", "../x"]),
        ("finetune.adam_eps=0", ["finetune.adam_eps", "0", "above 0"]),
        ("memory.k=65", ["memory.k", "65", "memory.sub_keys=64"]),
        ("memory.sub_keys=0", ["memory.sub_keys", "0"]),
        ("memory.heads=0", ["memory.heads", "0"]),
        ("memory.eps=0", ["memory.eps", "above 0"]),
        ("memory.betas=[0.9]", ["memory.betas", "two numbers"]),
        ("memory.positions=[9]", ["memory.positions", "plm.layers=4"]),
        ("memory.positions=[0]", ["memory.positions", "counted from 1"]),
        ("memory.columns=3", ["memory.columns", "plm.width=128"]),
        ("memory.lr=-1", ["memory.lr", "-1"]),
        ("memory.norm_momentum=10", ["memory.norm_momentum", "10", "in [0, 1]"]),
        ("train.adam_betas=[1,1]", ["train.adam_betas", "[0, 1)"]),
        ("plm.short_rows=[4]", ["plm.short_rows", "at least 8"]),
    ],
)
def test_what_a_masked_language_model_cannot_work_with_is_a_usage_error(override, words):
    with pytest.raises(UsageError) as caught:
        load_config("plm-small-resm", [override])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.cosine_period=0", "must be at least 1"), ("train.cosine_t_mult=0.5", "must be at least 1"),
        ("train.cosine_shrink=-1", "must not be negative"), ("train.warmup_init_lr=-1", "must not be negative"),
        ("train.momentum=1", r"must be in \[0, 1\)"), ("train.momentum=-0.1", r"must be in \[0, 1\)"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_work_is_refused_before_its_first_update(override, words):
    key = override.partition("=")[0]
    with pytest.raises(UsageError, match=rf"{key}=.*{words}"):
        load_config("wikitext103", [override])
    # Nobody reads them there.
    others = ("train.schedule=constant", "train.optimizer=adam") if "warmup" not in key else ("train.warmup_init_lr=0",)
    load_config("wikitext103", [override, *others])


@pytest.mark.parametrize("name", ["transformer_lm", "awd_lstm"])
def test_the_defaults_of_a_kind_name_hidden_states_that_it_has(tmp_path, name):
    path = tmp_path / "own.yaml"
    path.write_text(f"model: {{kind: {name}}}\ntrain: {{precision: fp32}}\n", "utf-8")
    config, found = load_config(str(path)), kind(name)
    for section in ("train", "datastore"):
        found.require_tap(found.describe(config), getattr(config, section).tap, f"{section}.tap")


def test_catching_up_and_counting_a_slot_s_own_updates_contradict_each_other():
    with pytest.raises(UsageError, match=r"memory\.row_steps=True: contradicts memory.stale=catch_up"):
        load_config("plm-small-resm", ["memory.stale=catch_up", "memory.row_steps=true"])


@pytest.mark.parametrize(
    ("recipe", "override", "readers"),
    [
        ("awd-lstm-small", "memory.kind=resm", "only by transformer_lm, hf, plm"),
        ("demo", "awd.epochs=3", "only by awd_lstm"),
        ("demo", "finetune.lr=1", "only by plm"),
        ("hf", "model.layers=3", "only by transformer_lm"),
        ("hf", "train.regulariser=queue", "only by transformer_lm"),
        ("awd-lstm-small", "train.updates=5", "only by transformer_lm, hf, plm"),
        ("awd-lstm-small", "train.l2_weight=1", "only by transformer_lm, hf"),
        ("plm-small", "knn.k=5", "only by transformer_lm, awd_lstm, hf"),
        ("plm-small", "data.max_words=5", "only by transformer_lm, awd_lstm, hf"),
    ],
)
def test_a_setting_that_the_kind_of_model_does_not_read_is_refused(recipe, override, readers):
    with pytest.raises(UsageError) as caught:
        load_config(recipe, [override])
    kind = load_config(recipe).model.kind
    key = override.partition("=")[0]
    assert f"command line: {key} is not read by model.kind={kind}, {readers}" in str(caught.value)


def test_a_configuration_has_the_sections_of_its_kind():
    assert list(config_tree(load_config("plm-small"))) == [
        "name", "run_dir", "model", "train", "launch", "shards", "plm", "memory", "finetune",
    ]  # fmt: skip
    assert {"plm", "memory", "hf"}.isdisjoint(config_tree(load_config("awd-lstm-small")))


def test_a_file_of_an_older_version_is_read_where_other_kinds_settings_are_their_defaults(tmp_path):
    """Those versions wrote the sections of every kind."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {kind: awd_lstm}\nmemory: {kind: none, k: 32}\ntrain: {updates: 286000, lr: 30, precision: fp32}\n",
        "utf-8",
    )
    assert load_config(str(path)).train.lr == 30
    path.write_text("model: {kind: awd_lstm}\nmemory: {kind: resm}\ntrain: {precision: fp32}\n", "utf-8")
    with pytest.raises(UsageError, match=r"memory\.kind is not read by model.kind=awd_lstm"):
        load_config(str(path))


def test_an_unknown_kind_of_model_names_those_there_are():
    with pytest.raises(UsageError, match=r"model\.kind='rnn': no such kind of model; choose one of transformer_lm"):
        load_config("demo", ["model.kind=rnn"])


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


@pytest.mark.parametrize("kind", run_classes())
def test_every_setting_has_help(kind):
    cls = run_classes()[kind]
    for text in (format_help(), format_help((), cls)):
        for key in leaf_fields(cls):
            assert f"  {key} (" in text
            assert text.split(f"  {key} (")[1].split("\n")[1].strip(), key


def test_titles_of_sections_are_whole_sentences():
    titles = [line for line in format_help().splitlines() if line and not line.startswith(" ")][1:]
    blocks = format_help().split("\n\n")[1:]
    assert len(titles) == len(blocks) and all(
        " ".join(line for line in block.splitlines() if " (" not in line[:60] or not line.startswith("  ")).strip()
        for block in blocks
    )
    assert all(block.splitlines()[0].endswith((".", ")")) or block.splitlines()[1].startswith("  ") for block in blocks)


def test_positions_beyond_the_training_length_are_warned_about_and_no_recipe_has_them():
    assert [position_warnings(load_config(name)) for name in recipe_names()] == [[]] * len(recipe_names())
    (warning,) = position_warnings(load_config("demo", ["knn.context_window=256", "knn.block=129"]))
    assert "knn.context_window + knn.block = 385" in warning and "train.tokens_per_sample=256" in warning
    assert position_warnings(load_config("demo", ["knn.context_window=256", "datastore.checkpoint=elsewhere"])) == []


def test_help_names_what_can_be_chosen():
    shown = format_help(["finetune"], None)
    assert "finetune.task (one of '', CoLA, SST-2" in shown and "finetune.tasks (some of CoLA, SST-2" in shown
    assert "typing" not in format_help((), None)
