"""The copy of the code: what git would not ignore, named by its content, whole or absent, first in the jobs' eyes."""

import json
import os
import subprocess
import sys

import pytest

from launchers.stages.snapshot import snapshot_path, source_files, source_tree, take_snapshot


@pytest.fixture
def tree(tmp_path):
    tree = tmp_path / "tree"
    for name in ("distlm/__init__.py", "distlm/a.py", "launchers/__init__.py", "ds_configs/z.json", "docs/other.md"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"# {name}\n", "utf-8")
    (tree / "distlm" / "__pycache__").mkdir()
    (tree / "distlm" / "__pycache__" / "a.pyc").write_bytes(b"")
    return tree


def names(tree):
    return [str(name) for name in source_files(tree)]


def test_without_git_all_but_caches(tree):
    assert names(tree) == ["distlm/__init__.py", "distlm/a.py", "ds_configs/z.json", "launchers/__init__.py"]


def test_with_git_also_new_files_but_no_ignored_or_deleted_ones(tree):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tree, check=True,
                       capture_output=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"})  # fmt: skip

    (tree / ".gitignore").write_text("*.log\n__pycache__/\n", "utf-8")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tree / "distlm" / "new.py").write_text("", "utf-8")
    (tree / "distlm" / "run.log").write_text("", "utf-8")
    (tree / "distlm" / "a.py").unlink()
    assert names(tree) == ["distlm/__init__.py", "distlm/new.py", "ds_configs/z.json", "launchers/__init__.py"]


def test_equal_code_is_copied_once_and_edited_code_beside_it(tree, tmp_path):
    run = tmp_path / "run"
    first = take_snapshot(run, tree)
    assert first == snapshot_path(run, tree) and first.parent == run / "code"
    stamp = (first / "distlm" / "a.py").stat().st_ino
    assert take_snapshot(run, tree) == first and (first / "distlm" / "a.py").stat().st_ino == stamp
    (tree / "distlm" / "a.py").write_text("changed\n", "utf-8")
    second = take_snapshot(run, tree)
    assert second != first and (first / "distlm" / "a.py").read_text("utf-8") == "# distlm/a.py\n"
    assert sorted(path.name for path in (run / "code").iterdir()) == sorted([first.name, second.name])
    assert json.loads((second / "VERSION.json").read_text("utf-8"))["tree"] == str(tree)


def test_the_copy_runs_and_the_working_folder_does_not_shadow_it(tmp_path):
    """A folder `distlm` where the user stands, and an installed distlm, both lose against the copy."""
    copy = take_snapshot(tmp_path / "run")
    assert copy != source_tree()
    (tmp_path / "distlm").mkdir()
    (tmp_path / "distlm" / "__init__.py").write_text("raise SystemExit('the wrong distlm')\n", "utf-8")
    code = "from distlm.training.dsconfig import find_ds_config; import launchers; "
    code += "print(find_ds_config('zero1'), launchers.__file__)"
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(copy / "ds_configs" / "zero1.json"), str(copy / "launchers" / "__init__.py")]
