"""What a RECIPE argument names: bases of recipes, and run directories."""

from pathlib import Path

import pytest
import yaml

from distlm.config.load import config_tree, dump_config, dump_difference, load_config, split_words
from distlm.config.recipe import is_run_dir, read_recipe, recipe_names, recipe_summaries
from distlm.config.schema import sections_of
from distlm.config.training import UpdatesConfig
from distlm.errors import UsageError
from distlm.models.registry import kind, kind_names

RECIPES = Path(load_config.__code__.co_filename).parent / "recipes"


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, "utf-8")
    return folder


def values_of(recipe: str) -> dict[str, object]:
    sections = {section for name in kind_names() for section in sections_of(kind(name).config)}
    return read_recipe(recipe, sections).values


def test_a_recipe_says_what_differs_from_its_base(tmp_path: Path) -> None:
    write(tmp_path, mine="base: wikitext2-small\ntrain: {lr: 0.5}\n")
    mine, base = load_config(str(tmp_path / "mine.yaml")), load_config("wikitext2-small")
    assert (mine.name, mine.run_dir, mine.train.lr) == ("mine", "runs/mine", 0.5)
    mine.name, mine.run_dir, mine.train.lr = base.name, base.run_dir, base.train.lr
    assert config_tree(mine) == config_tree(base)


def test_bases_make_a_chain_of_files_beside_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path, first="base: demo\nname: one\nrun_dir: /elsewhere\ntrain: {lr: 0.25, updates: 5}\n")
    write(tmp_path / "below", second="base: ../first.yaml\ntrain: {updates: 7}\nlaunch: {ranks: 3}\n")
    monkeypatch.chdir("/")
    found = load_config(str(tmp_path / "below" / "second.yaml"), ["launch.ranks=4"])
    assert (found.name, found.run_dir) == ("second", "runs/second")
    assert (found.train.lr, found.section(UpdatesConfig).updates, found.launch.ranks, found.data.source) == (
        0.25,
        7,
        4,
        "demo",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: dmo", ["mine.yaml", "base='dmo'", "did you mean 'demo'", "wikitext103"]),
        ("base: 7", ["mine.yaml", "base=7", "name of a recipe"]),
        ("base: mine.yaml", ["mine.yaml", "leads back", "→"]),
        ("base: other.yaml", ["other.yaml: train.lr='fast'", "float"]),
        ("base: folder", ["base='folder'", "no such file"]),
    ],
)
def test_a_wrong_base_is_one_clear_error(text: str, words: list[str], tmp_path: Path) -> None:
    write(tmp_path, mine=text + "\n", other="train: {lr: fast}\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError) as caught:
        load_config(str(tmp_path / "mine.yaml"))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_circle_of_bases_is_told(tmp_path: Path) -> None:
    write(tmp_path, a="base: b.yaml\n", b="base: c.yaml\n", c="base: b.yaml\n")
    with pytest.raises(UsageError, match=r"b\.yaml → .*c\.yaml → .*b\.yaml"):
        load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_names_no_value_that_its_base_has(name: str) -> None:
    tree = yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8"))
    if "base" not in tree:
        return
    base = config_tree(load_config(tree.pop("base")))
    for key, value in tree.items():
        again = [inner for inner in value if base[key][inner] == value[inner]] if isinstance(value, dict) else []
        assert not again and base[key] != value, f"{name}: {key} {again}: its base has that"


def test_recipes_that_repeated_one_another_have_a_base() -> None:
    trees = {name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8")) for name in recipe_names()}
    assert {name: tree["base"] for name, tree in trees.items() if "base" in tree} == {
        "awd-lstm-overfit": "awd-lstm-small", "awd-lstm-ptb": "awd-lstm-wikitext2",
        "awd-lstm-ptb-released": "awd-lstm-ptb", "awd-lstm-wikitext2-released": "awd-lstm-wikitext2",
        "plm-base-pkm": "plm-base", "plm-base-resm": "plm-base",
        "plm-small-pkm": "plm-small", "plm-small-resm": "plm-small", "wikitext2": "wikitext103-paper",
        "wikitext103-paper": "wikitext103", "wikitext103-pkm": "wikitext103", "wikitext2-overfit": "wikitext2-sweep",
        "wikitext2-small-pkm": "wikitext2-small",
    }  # fmt: skip
    assert values_of("plm-base-pkm") == values_of("plm-base") | {"name": "plm-base-pkm", "memory.kind": "pkm"}


def test_every_recipe_has_a_sentence_about_itself() -> None:
    assert list(recipe_summaries()) == recipe_names()
    for name, summary in recipe_summaries().items():
        assert summary[0].isupper() and summary.endswith(".") and len(summary) > 20, name


@pytest.mark.parametrize("name", recipe_names())
def test_the_difference_from_the_defaults_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "again.yaml"
    path.write_text(dump_difference(config), "utf-8")
    assert config_tree(load_config(str(path))) == config_tree(config)


def test_the_difference_has_nothing_that_is_a_default() -> None:
    assert yaml.safe_load(dump_difference(load_config("wikitext103", ["launch.ranks=1", "knn.batch_blocks=2"]))) == {
        "name": "wikitext103", "knn": {"nprobe": 128, "ks": [1, 8, 64, 256, 1024]},
    }  # fmt: skip
    assert yaml.safe_load(dump_difference(load_config("plm-base-pkm", ["run_dir=here"])))["run_dir"] == "here"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    settings = ["name=mine", f"run_dir={folder}", "train.lr=0.5", "train.max_updates_this_run=3", "launch.share=1/4"]
    (folder / "config.yaml").write_text(dump_config(load_config("demo", settings)), "utf-8")
    return folder


def test_a_run_directory_is_its_latest_configuration(run: Path) -> None:
    found = load_config(str(run), ["train.updates=7"])
    assert (found.name, found.run_dir, found.train.lr, found.section(UpdatesConfig).updates) == (
        "mine",
        str(run),
        0.5,
        7,
    )


def test_what_held_for_one_start_is_not_asked_of_the_next(run: Path) -> None:
    found = load_config(str(run))
    assert (found.train.max_updates_this_run, found.launch.share) == (0, "")
    # The file itself says what was asked.
    assert load_config(str(run / "config.yaml")).train.max_updates_this_run == 3


def test_a_run_that_was_moved_is_where_it_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.rename(run.with_name("moved"))
    monkeypatch.chdir(run.parent)
    assert load_config("moved").run_dir == load_config("moved/").run_dir == load_config("./moved").run_dir == "moved"
    # Asked for by name, another folder is meant.
    assert load_config("moved", ["run_dir=copy"]).run_dir == "copy"


def test_a_folder_without_a_configuration_is_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(str(tmp_path))
    assert all(word in str(caught.value) for word in (str(tmp_path), "config.yaml", "run_dir=")), caught.value


def test_a_recipe_of_the_package_goes_before_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").run_dir == "runs/demo"
    assert [is_run_dir(word) for word in ("demo", "./demo", "a=b", "none")] == [False, True, True, False]
    assert split_words(["a=b", "train.lr=1"]) == ("a=b", ["train.lr=1"])


def test_an_empty_file_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("\n", "utf-8")
    with pytest.raises(UsageError, match=r"mine\.yaml: an empty file, not a recipe\. Recipes: "):
        load_config(str(tmp_path / "mine.yaml"))
