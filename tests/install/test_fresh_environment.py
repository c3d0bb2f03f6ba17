"""`pip install .` without make, in environments that have nothing: the demo from there, outside the source tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.bare import SHORT, pip_settings

ROOT = Path(__file__).resolve().parents[2]
HOUR_S = 3600


def ran(
    command: list[str], folder: Path, more: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, without what the tests' own environment would lend it."""
    lent = ("PYTHON", "OMPI", "DISTLM", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if not name.startswith(lent)} | (more or {})
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=HOUR_S)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def interpreter(version: str) -> str:
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no python{version} on PATH")
    return found


def clean_tree(folder: Path) -> Path:
    """What git has, where pip may build it."""
    archive = folder / "tree.tar"
    subprocess.run(["git", "archive", "-o", str(archive), "HEAD"], cwd=ROOT, check=True)
    (folder / "tree").mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(folder / "tree")], check=True)
    return folder / "tree"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_a_fresh_environment_runs_the_demo(version: str, tool: str, tmp_path: Path) -> None:
    tree, place, elsewhere = clean_tree(tmp_path), tmp_path / "fresh", tmp_path / "elsewhere"
    elsewhere.mkdir()
    ran([interpreter(version), "-m", "venv", str(place)], tmp_path)
    # The pins, as a user would give them; the rest is this machine's way to packages.
    pins, settings = ["-c", str(tree / "constraints.txt")], pip_settings()
    install = [str(place / "bin/pip"), "install"]
    if tool == "uv":
        ran([*install, "uv"], tmp_path)
        install = [str(place / "bin/uv"), "pip", "install", "--python", str(place / "bin/python")]
        # uv looks at the first index that has a package, and pip at all of them.
        names = {
            "PIP_FIND_LINKS": "UV_FIND_LINKS", "PIP_EXTRA_INDEX_URL": "UV_INDEX",
            "PIP_INDEX_URL": "UV_DEFAULT_INDEX", "PIP_CERT": "SSL_CERT_FILE",
        }  # fmt: skip
        settings = {names[name]: value for name, value in settings.items() if name in names}
        settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    ran([*install, *pins, str(tree)], elsewhere, settings)
    shutil.rmtree(tree)
    distlm = str(place / "bin/distlm")
    packages = Path(ran([str(place / "bin/python"), "-c", "import distlm; print(distlm.__file__)"], elsewhere)
                    .stdout.strip()).parents[1]  # fmt: skip
    assert packages.is_relative_to(place) and not (packages / "launchers").exists()
    # Without an extra there is no index and no mpirun: the doctor says so, and what it says works.
    said = ran([distlm, "doctor"], elsewhere, check=False)
    line = next(line for line in said.stdout.splitlines() if line.startswith("faiss "))
    advice = re.search(r"-> (pip install [^,]+)", line)
    assert said.returncode == 1 and advice is not None, said.stdout
    ran(["bash", "-c", f"{' '.join(install)} {advice[1].removeprefix('pip install ')}"], elsewhere, settings)
    said = ran([distlm, "doctor"], elsewhere, check=False)
    assert said.returncode == 0, said.stdout
    said = ran([distlm, "run", "demo", *SHORT], elsewhere)
    assert "perplexity" in said.stdout and (elsewhere / "runs/demo/report.html").is_file()
    print(said.stdout[-1500:])
    # The launchers of the package: a site file, and the same recipe through submitit.
    ran([distlm, "site", "init"], elsewhere)
    said = ran([distlm, "submit", "demo", "name=again", *SHORT, "--cluster", "local", "--ranks", "2"], elsewhere)
    assert (elsewhere / "runs/again/results").is_dir() and (elsewhere / "runs/again/code").is_dir(), said.stdout
