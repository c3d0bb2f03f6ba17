"""What a stranger looks for first: licence, version, citation, changelog, extras."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import distlm
from distlm import installed

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_licence_is_apache_2_with_its_full_text() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE", "NOTICE"]
    assert text.split()[:3] == ["Apache", "License", "Version"] and len(text) > 11000
    assert "9. Accepting Warranty" in text and "the distlm authors" in (ROOT / "NOTICE").read_text("utf-8")
    assert PROJECT["authors"] and PROJECT["urls"] and PROJECT["keywords"] and PROJECT["classifiers"]


def test_the_version_is_that_of_the_changelog_and_of_the_citation() -> None:
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    released = re.findall(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert released[0] == distlm.__version__ and released[-1] == "0.1.0"
    for name in ("pyproject.toml", "README.md"):
        assert distlm.__version__ not in (ROOT / name).read_text("utf-8"), name
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == distlm.__version__
    heading = f"## [{citation['version']}] - {citation['date-released']}"
    assert heading in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines(), "the date of a release: in both files"


def test_the_citation_names_the_papers_of_all_methods() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= {*citation}
    papers = {paper["url"].rpartition("/")[2] for paper in citation["references"]}
    assert papers == {"1911.00172", "2109.08249", "2010.03881", "1708.02182", "1612.04426", "1907.05242", "2412.09764",
                      "2210.15859"}  # fmt: skip
    assert all(paper["title"] and paper["authors"] and paper["year"] for paper in citation["references"])


def test_the_pythons_are_those_that_make_and_the_doctor_know() -> None:
    stated = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert stated == ["3.11", "3.12", "3.13"] and PROJECT["requires-python"] == ">=3.11"
    assert "(3, 11) <= v <= (3, 13)" in (ROOT / "Makefile").read_text("utf-8")
    assert "sys.version_info[:2] <= (3, 13)" in (ROOT / "distlm/runtime/doctor/machine.py").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "distlm").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_errors_name_extras_that_there_are(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "distlm[" not in text or path.name == "installed.py", "use distlm.installed.install"
    for extra in re.findall(r"\binstall\(['\"]([\w-]+)['\"]\)", text):
        assert extra in EXTRAS, f"{path}: {extra}"


def test_the_page_lists_every_extra() -> None:
    text = (ROOT / "docs/get-started.md").read_text("utf-8")
    table = text.partition("| extra | gives |")[2].partition("\n\n")[0]
    assert {*re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)} == {*EXTRAS} - {"dev"}
    for shown in re.findall(r"'\.\[([\w,-]+)\]'", "".join(p.read_text("utf-8") for p in (ROOT / "docs").glob("*.md"))):
        assert {*shown.split(",")} <= {*EXTRAS}, shown


@pytest.mark.parametrize("extra", sorted({*EXTRAS} - {"dev"}))
def test_an_error_about_an_extra_names_a_command_for_this_tree(extra: str) -> None:
    said = installed.install(extra)
    assert said.startswith("pip install -c ") and said.endswith(f"-e '{ROOT}[{extra}]'"), said
    assert (ROOT / "pyproject.toml").is_file() and (ROOT / "constraints.txt").is_file()


def test_outside_a_tree_it_names_what_the_extra_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PACKAGE", tmp_path / "site-packages" / "distlm")
    said = installed.install("cpu")
    names = {Requirement(word.strip("'")).name for word in said.removeprefix("pip install ").split()}
    assert names == {Requirement(text).name for text in EXTRAS["cpu"]}, said


def test_pins_exist_for_all_that_the_project_asks_for() -> None:
    pinned = {Requirement(line).name.lower().replace("_", "-")
              for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line[:1].isalnum()}  # fmt: skip
    wanted = [*PROJECT["dependencies"], *(text for name, texts in EXTRAS.items() if name != "gpu" for text in texts)]
    missing = {Requirement(text).name.lower().replace("_", "-") for text in wanted} - pinned
    assert not missing
