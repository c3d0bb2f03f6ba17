"""The README's way to your own text, on a small text: the recipe's name, the folder, and tiny sizes on top."""

from pathlib import Path

import pytest
from support import TINY, distlm, write_text

TEXT = [word for word in TINY if not word.startswith("name=")]


def words(tmp_path: Path) -> list[str]:
    text = write_text(tmp_path / "text", train_lines=300)
    return ["name=mine", f"data.text_dir={text}", "launch.ranks=2", f"run_dir={tmp_path / 'mine'}", *TEXT]


def test_own_text_with_the_small_recipe(tmp_path: Path) -> None:
    shown = distlm("run", "wikitext2-small", *words(tmp_path), "--dry-run").stdout
    assert "mpirun" in shown and "distlm train wikitext2-small name=mine" in shown


@pytest.mark.slow
def test_own_text_to_the_end(tmp_path: Path) -> None:
    done = distlm("run", "wikitext2-small", *words(tmp_path), "train.updates=3")
    assert "perplexity" in done.stdout and (tmp_path / "mine" / "report.html").exists()
