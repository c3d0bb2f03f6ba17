"""The wheel: `distlm` alone at the top, with all that the source tree has for users inside it; it works unpacked."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ENVIRONMENT
from support.deadline import DEADLINE_S

ROOT = Path(__file__).resolve().parents[2]
INSIDE = ("launchers", "slurm", "ds_configs")
"""Folders of the source tree that a wheel has in distlm/_tree."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT,
                          capture_output=True, text=True, timeout=DEADLINE_S)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("distlm-*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def source_files(folder: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", folder], cwd=ROOT,
                            capture_output=True, text=True)  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in files}


def test_the_wheel_holds_the_package_and_what_lies_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"{wheel.name.rpartition('-py3')[0]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"distlm", info}
    wanted = source_files("distlm") | {f"distlm/_tree/{name}" for folder in INSIDE for name in source_files(folder)}
    assert {name for name in names if name.startswith("distlm/")} == wanted
    for name in ("launchers/submit.py", "slurm/train.sbatch", "slurm/common.sh", "slurm/site.example.yaml",
                 "ds_configs/zero1.json"):  # fmt: skip
        assert f"distlm/_tree/{name}" in names
    assert {"distlm/py.typed", "distlm/config/recipes/demo.yaml", f"{info}/licenses/LICENSE"} <= names


def test_its_metadata_says_what_pyproject_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        said = email.message_from_bytes(archive.read(name))
    version: dict[str, str] = {}
    exec((ROOT / "distlm/__init__.py").read_text("utf-8").split("_PLACES")[0], version)
    assert said["Version"] == version["__version__"] and said["License-Expression"] == "Apache-2.0"
    assert {"cpu", "gpu", "demo", "hf", "plm", "trackers", "docs"} <= {*said.get_all("Provides-Extra", [])}


def run(unpacked: Path, folder: Path, *words: str) -> str:
    """`python WORDS` with the unpacked wheel before any other distlm, outside the source tree."""
    env = {**ENVIRONMENT, "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=DEADLINE_S)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_unpacked_wheel_finds_its_launchers_scripts_and_files(unpacked: Path, tmp_path: Path) -> None:
    inside = unpacked / "distlm/_tree"
    said = run(unpacked, tmp_path, "-m", "distlm", "site", "init")
    assert "site.yaml" in said
    text = (tmp_path / "site.yaml").read_text("utf-8")
    assert text == (ROOT / "slurm/site.example.yaml").read_text("utf-8")
    assert "--nodes=2" in run(unpacked, tmp_path, "-m", "distlm", "site", "flags", "train")
    assert Path(run(unpacked, tmp_path, "-m", "distlm", "site", "scripts").strip()) == inside / "slurm"
    code = "from distlm.commands.jobs import _module; from distlm.training.dsconfig import find_ds_config; "
    code += "print(_module('submit').__file__, find_ds_config('zero1'))"
    assert run(unpacked, tmp_path, "-c", code).split() == [
        str(inside / "launchers/submit.py"), str(inside / "ds_configs/zero1.json"),
    ]  # fmt: skip
    said = run(unpacked, tmp_path, "-m", "distlm", "submit", "demo", "--ranks", "2", "--dry-run")
    assert "#SBATCH" in said or "front: local" in said


def test_a_copy_of_the_code_from_a_wheel_has_the_shape_of_a_source_tree(unpacked: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from distlm.installed import tree; sys.path.insert(0, str(tree())); "
    code += "from launchers.stages.snapshot import take_snapshot; print(take_snapshot(Path('run')))"
    copy = Path(run(unpacked, tmp_path, "-c", code).strip())
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()} - {"VERSION.json"}
    assert found == {name for folder in ("distlm", "launchers", "ds_configs") for name in source_files(folder)}
    env = {**ENVIRONMENT, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    code = "import distlm, launchers.task; from distlm.installed import tree; print(distlm.__file__, tree())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(copy / "distlm/__init__.py"), str(copy)], done.stderr


def test_a_site_file_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("partition: mine\n", "utf-8")
    done = subprocess.run([sys.executable, "-m", "distlm", "site", "init"], cwd=tmp_path, env=ENVIRONMENT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "site.yaml: there is a site file" in done.stderr
    assert (tmp_path / "site.yaml").read_text("utf-8") == "partition: mine\n"
