"""A copy of the code in the run directory, so that jobs run what was there when they were submitted.

RUN/code/HASH/{distlm,launchers,ds_configs}/…: named by its content, so equal code is copied once. VERSION.json beside
them says which commit it was. The copy of an installed wheel has the same shape.
"""

import os
import shutil
import subprocess
from pathlib import Path

from distlm.installed import PACKAGE
from distlm.runtime.files import file_hash, json_hash
from distlm.runtime.records import CodeSnapshot
from distlm.runtime.rundir import code_version

FOLDERS = ("distlm", "launchers", "ds_configs")
VERSION = "VERSION.json"
_NEVER = ("__pycache__", ".mypy_cache", ".ruff_cache", "_tree")


def source_tree() -> Path:
    """The folder that holds the running launchers: a source tree, or the one in a wheel."""
    return Path(__file__).resolve().parents[2]


def source_files(tree: Path) -> list[Path]:
    """Files of the code, relative and sorted: what git would not ignore, or all but caches without git.

    `tree` is as `source_tree` gives it.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *FOLDERS],
        cwd=tree, capture_output=True, text=True,
    ) if (tree / "distlm").is_dir() and shutil.which("git") else None  # fmt: skip
    if listed is not None and listed.returncode == 0 and listed.stdout:
        names = {Path(name) for name in listed.stdout.split("\0") if name}
    else:
        names = {Path(folder) / path.relative_to(_at(tree, folder)) for folder in FOLDERS
                 for path in _at(tree, folder).rglob("*")}  # fmt: skip
    return sorted(
        name for name in names if _at(tree, name).is_file() and not any(part in _NEVER for part in name.parts)
    )


def snapshot_path(run: Path, tree: Path | None = None) -> Path:
    """Where the code as it is now would be copied to; nothing is written."""
    tree = tree or source_tree()
    return _place(run, tree, source_files(tree))


def take_snapshot(run: Path, tree: Path | None = None) -> Path:
    """Copy the code to RUN/code/HASH unless it is there; the folder, absolute. It is whole or absent."""
    tree = tree or source_tree()
    names = source_files(tree)
    final = _place(run, tree, names)
    if final.exists():
        return final
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        for name in names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_at(tree, name), temporary / name)
        git = code_version().git if (tree / "distlm").is_dir() and shutil.which("git") else None
        CodeSnapshot(git=git, source=str(tree)).write(temporary / VERSION)
        # Of a file edited while it was copied, the name must tell what was copied.
        final = _place(run, temporary, names)
        if not final.exists():
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _at(tree: Path, name: str | Path) -> Path:
    """Where a file of the code lies: a wheel has the package itself elsewhere than the launchers."""
    beside = tree if (tree / "distlm").is_dir() else PACKAGE.parent
    return (beside if Path(name).parts[0] == "distlm" else tree) / name


def _place(run: Path, tree: Path, names: list[Path]) -> Path:
    content = [[str(name), file_hash(_at(tree, name))] for name in names]
    return run.resolve() / "code" / json_hash(content)[:12]
