"""Every `distlm` command and benchmark that a page or a record of results shows is accepted."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from support import distlm

from distlm.analysis.results.page import read_results
from distlm.cli import _commands, main
from distlm.config.load import dump_config, load_config
from distlm.config.recipe import recipe_names
from distlm.runtime.records import BestCheckpoint

ROOT = Path(__file__).resolve().parents[2]
RESULTS = [
    (f"{name}.json", command) for name, record in read_results(ROOT / "results").items() for command in record.commands
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "distlm").rglob("*.yaml"))]


def shown_commands() -> list[tuple[str, str]]:
    commands = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:#\s+)?(?:mpirun .*|torchrun .*)?\bdistlm [a-z].*$", text, re.MULTILINE):
            command = "distlm " + line.split("distlm ", 1)[1]
            command = re.sub(r"\s{2,}[#(].*$|\s+>\s.*$", "", command)
            if "RECIPE" not in command and "VERB" not in command:
                commands.append((page.name, command.strip()))
    commands += [(name, command) for name, command in RESULTS if command.startswith("distlm ")]
    return sorted(set(commands))


def test_lists_are_quoted_in_what_is_shown():
    """zsh takes the brackets of an unquoted one for a pattern, and starts nothing."""
    shown = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        lines += re.findall(r"`(distlm [^`\n]*)`", text) + re.findall(r"^#\s+(distlm .*)$", text, re.MULTILINE)
        shown += [(page.name, line) for line in lines if "RECIPE" not in line]
    bare = [(page, line) for page, line in shown if re.search(r"\[[^ ]", re.sub(r"'[^']*'|\"[^\"]*\"|\s#.*", "", line))]
    assert shown and not bare


def make_run(folder: Path) -> None:
    """A run directory of the recipe of its name; `mine` is whatever the page has trained before."""
    folder.mkdir(parents=True)
    recipe = folder.name if folder.name in recipe_names() else "wikitext2-small"
    (folder / "config.yaml").write_text(dump_config(load_config(recipe)), "utf-8")


@pytest.mark.parametrize(("page", "command"), shown_commands(), ids=lambda value: value.replace(" ", "_")[:60])
def test_a_shown_command_is_accepted(page, command, tmp_path, capfd, monkeypatch):
    arguments = shlex.split(command)[1:]
    monkeypatch.chdir(tmp_path)
    figures = arguments[:2] in (["report", "frequency"], ["report", "clusters"])
    for word in arguments:
        if re.fullmatch(r"runs/[\w-]+", word) and not figures:
            make_run(Path(word))
    if arguments[0] == "doctor":
        done = distlm(*arguments, check=False)
        assert done.returncode in (0, 1), f"{page}: {command}\n{done.stderr}"
        return
    if arguments[0] in ("submit", "status", "logs", "cancel", "requeue", "site", "deepspeed", "completion"):
        # What they do is tested in tests/launchers and tests/test_commands.py.
        _commands().parse(arguments)
        return
    accepted = arguments[0] in ("config", "recipes") or "--help" in arguments
    if arguments[0] == "reproduce" and not accepted:
        # It looks for the folders before it plans.
        given = [re.sub(r"^(\w+)=/.*", rf"\1={tmp_path}", word) for word in arguments]
        arguments = [*given, "--into", str(tmp_path), "--dry-run"]
    elif figures:
        # The runs are not there; what is wrong with the command itself is a usage error (2).
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 1 and "there is no such run" in capfd.readouterr().err, f"{page}: {command}"
        return
    elif arguments[0] == "metrics":
        # A seed's folder is none of a run.
        Path(arguments[1]).mkdir(parents=True, exist_ok=True)
        (Path(arguments[1]) / "metrics.jsonl").touch()
        accepted = True
    elif arguments[0] == "verify":
        BestCheckpoint(checkpoint="step-00000001", valid_loss=1.0).write(Path(arguments[1]) / "best.json")
        accepted = True
    elif arguments[:2] in (["index", "extend"], ["index", "drop"]):
        # They need no recipe, and the index is not there.
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 1 and "no such file" in capfd.readouterr().err, f"{page}: {command}"
        return
    elif arguments[0] == "clean":
        # What it names is not in the run directory of this test.
        if "--only" in arguments:
            place = arguments.index("--only")
            del arguments[place : place + 2]
        accepted, arguments = True, [*dict.fromkeys([*arguments, "--dry-run"])]
    elif arguments[0] == "sweep":
        # The run directory of this test has no text.
        arguments = [*dict.fromkeys([*arguments, "--dry-run", f"run_dir={tmp_path}", "data.source=demo"])]
    elif "--parts" in arguments:
        # Its files are checked in tests/index/merge/test_join.py.
        assert {"--parts", "--out"} <= {*arguments} and arguments[:2] == ["index", "merge"]
        return
    elif not accepted:
        arguments = [*(word for word in arguments if word != "--dry-run"), "--print-config", f"run_dir={tmp_path}"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code in (0, None), f"{page}: {command}\n{capfd.readouterr().err}"


BENCHMARKS = ROOT / "benchmarks"


def shown_benchmarks() -> list[tuple[str, str]]:
    """(page, `benchmarks/NAME.py …`) of pages, where a command may go on in the next line, and of how each is used."""
    commands = []
    for page in [*PAGES, *sorted(BENCHMARKS.glob("*.py"))]:
        text = re.sub(r"\\?\n +(?=\[?--)", " ", page.read_text("utf-8"))
        # In brackets: what may be left out.
        found = re.findall(r"python (benchmarks/\w+\.py[^`\n]*)", text)
        commands += [(page.name, re.sub(r"[\[\]]", "", command).strip()) for command in found]
    commands += [
        (name, command.removeprefix("python ")) for name, command in RESULTS if "python benchmarks/" in command
    ]
    return sorted(set(commands))


@pytest.mark.parametrize(("page", "command"), shown_benchmarks(), ids=lambda value: value.replace(" ", "_")[:60])
def test_a_shown_benchmark_is_accepted(page, command, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    path, *arguments = shlex.split(command)
    try:
        importlib.import_module(Path(path).stem).parser().options(arguments)
    except SystemExit:
        pytest.fail(f"{page}: {command}\n{capfd.readouterr().err}")


def test_every_benchmark_says_how_it_is_used():
    shown = {(page, command.split()[0]) for page, command in shown_benchmarks()}
    assert {(path.name, f"benchmarks/{path.name}") for path in BENCHMARKS.glob("*.py")} <= shown


def test_make_targets_that_the_readme_shows_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    shown = set(re.findall(r"`?make ([a-z][a-z-]*)", (ROOT / "README.md").read_text("utf-8")))
    assert {"demo", "test", "clean-demo"} <= shown
    for target in shown:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
