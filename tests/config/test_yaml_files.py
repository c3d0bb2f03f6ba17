"""YAML that nobody means: a reason in one line."""

from pathlib import Path

import pytest

from distlm.config.load import load_config, split_words
from distlm.config.yaml_files import recorded_settings, yaml_of
from distlm.errors import DistlmError, UsageError

BROKEN = {
    "a key twice": ("train: {updates: 3, updates: 4}", "the key 'updates' is there twice (line 1)"),
    "a section twice": ("train: {}\nknn: {}\ntrain: {lr: 1}", "the key 'train' is there twice (line 3)"),
    "no end": ("train: {updates: 3", "expected"),
    "a tag": ("train: !!python/object:os.system {}", "could not determine a constructor"),
    "a date that is none": ("name: 2026-99-99", "a value that YAML cannot read"),
    "a number without digits": ("name: !!int ''", "a value that YAML cannot read"),
    "an alias within itself": ("train: &a {updates: [*a]}", "nested too deep"),
    "nested": ("[" * 500 + "]" * 500, "nested too deep"),
    "an unknown alias": ("train: *nowhere", "undefined alias"),
    "a control character": ("name: a\x07b", "special characters are not allowed"),
    "a tab": ("train:\n\tlr: 1", "found character"),
    "a mapping as a key": ("{a: 1}: 2", "unhashable"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, tmp_path: Path) -> None:
    text, words = BROKEN[name]
    with pytest.raises(ValueError) as caught:
        yaml_of(text)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=rf"^{path}: not valid YAML: "):
        load_config(str(path))
    with pytest.raises(DistlmError, match=rf"^{path}: damaged: "):
        recorded_settings(path)


@pytest.mark.parametrize("text", ["7", "[1]", "null", "train: 5", "train: [1]", "text"])
def test_no_settings(text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(DistlmError, match=rf"^{path}: damaged: .*put it back"):
        recorded_settings(path)


def test_anchors_and_merges_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: demo\nknn: &k {k: 7}\nname: &n seven\ndata: {text_dir: *n}\n", "utf-8")
    found = load_config(str(path))
    assert found.knn.k == 7 and found.data.text_dir == "seven"
    assert yaml_of("a: &a {x: 1}\nb: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


def test_a_long_list_of_values_is_no_path() -> None:
    values = ",".join(f"{number / 1000:.3f}" for number in range(200))
    assert split_words(["demo", f"knn.lambdas=[{values}]"])[1] == [f"knn.lambdas=[{values}]"]
    assert len(load_config("demo", [f"knn.lambdas=[{values}]"]).knn.lambdas) == 200
