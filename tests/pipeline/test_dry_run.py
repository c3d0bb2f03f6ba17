"""Every recipe can be planned from its text alone: `distlm run RECIPE --dry-run` shows its stages, writes nothing."""

import re
from pathlib import Path

import pytest
from support import write_text
from support.foreign.hf import save_gpt2

from distlm.cli import main
from distlm.config.recipe import recipe_names

BY_NEIGHBOURS = ("data prepare", "train", "datastore write", "index build", "knn search", "knn tune", "knn evaluate")
STAGES = {"awd-lstm": ("data prepare", "train", "evaluate"), "plm": ("data shard", "train", "evaluate")}
"""By the beginning of the recipe's name; of the others the first."""
SHORT = [f"{section}.{name}=32" for section in ("datastore", "knn") for name in ("context_window", "block")]
SHORT += ["index.factory=IVF64,PQ8", "knn.k=64"]
"""The model of the recipe `hf` is a small one here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text/, and gpt2/ of its bytes."""
    folder = tmp_path_factory.mktemp("dry")
    save_gpt2(folder / "gpt2", write_text(folder / "text"))
    return folder


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_planned(recipe: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind = next((name for name in STAGES if recipe.startswith(name)), "")
    text = f"{'shards' if kind == 'plm' else 'data'}.text_dir={folder / 'text'}"
    given = {"demo": [], "hf": [text, f"hf.name={folder / 'gpt2'}", *SHORT]}.get(recipe, [text])
    with pytest.raises(SystemExit) as end:
        main(["run", recipe, f"run_dir={tmp_path / 'run'}", *given, "--dry-run"])
    out, err = capfd.readouterr()
    assert end.value.code == 0, err
    commands = re.findall(rf"^ +\$ (?:mpirun .*)?distlm ([a-z ]+) {recipe} ", out, re.MULTILINE)
    assert tuple(commands) == STAGES.get(kind, BY_NEIGHBOURS), out
    assert out.count("memory/rank") == len(commands)
    assert list(tmp_path.iterdir()) == []
