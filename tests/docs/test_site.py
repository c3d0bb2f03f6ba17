"""The documentation as a site: it builds without a warning, every page is in its navigation, a broken link fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.deadline import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]


def build(tree: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build` of a tree with mkdocs.yml and docs/, whose settings are strict."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    return subprocess.run(command, cwd=tree, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
                          text=True, timeout=DEADLINE_S)  # fmt: skip


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"} | {"contributing", "changelog"}
    assert pages == {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    home = (tmp_path / "site/index.html").read_text("utf-8")
    for page in pages:
        assert f'href="{page}/"' in home, f"{page} is not in the navigation"
    # mkdocs takes index.md for the home page, which is README.md here.
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if "](index.md" in page.read_text("utf-8")]
    # Fonts would come from elsewhere.
    assert "fonts.googleapis" not in home


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gone](no-such-page.md)", "no-such-page.md"),
        ("[gone](glossary.md#no-such-term)", "no-such-term"),
    ],
)
def test_a_broken_link_is_found(text: str, words: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "docs", tree / "docs")
    for name in ("mkdocs.yml", "mkdocs_hooks.py", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tree)
    with (tree / "docs/glossary.md").open("a") as stream:
        stream.write(f"\n{text}\n")
    done = build(tree, tmp_path / "site")
    assert done.returncode == 1 and words in done.stderr, done.stderr


def test_the_glossary_has_the_words_of_the_reports() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text("utf-8")
    sources = [path for ending in ("html", "py") for path in (ROOT / "distlm/analysis").rglob(f"*.{ending}")]
    shown = "".join(path.read_text("utf-8") for path in sources)
    for word in ("MU", "top-1 MU", "KL_u", "KL_w", "Gini", "target retrieved", "values permuted, nats", "recall@k",
                 "verdict", "nprobe", "p_kNN"):  # fmt: skip
        assert f"**{word}**" in glossary or f"**{word}** (" in glossary, word
        column = word.partition("@")[0]
        assert f'"{column}' in shown or f">{column}<" in shown, f"{word}: no report says so any more"
