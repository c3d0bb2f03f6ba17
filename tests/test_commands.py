"""The commands of the command line: which there are, what they cost to list, and how shells complete them."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, TINY, warm
from support.deadline import DEADLINE_S

from distlm.cli import _commands, main
from distlm.config.load import dump_config, load_config
from distlm.runtime.metrics import MetricsFile
from distlm.verbs import STAGE_VERBS

JOBS = ("submit", "status", "logs", "cancel", "requeue", "deepspeed", "site")


def every_command() -> list[str]:
    commands = _commands()
    commands.tree(whole=True)
    return list(commands._parsers)


def output_of(capsys: pytest.CaptureFixture, *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    found = capsys.readouterr()
    assert (end.value.code or 0) == code, found.err
    return found.out, found.err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config("plm-small", [f"run_dir={folder}", "shards.folder=/nowhere"])
    (folder / "config.yaml").write_text(dump_config(config), "utf-8")
    return folder


def test_metrics_as_csv_and_as_a_table(run: Path, capsys: pytest.CaptureFixture) -> None:
    said = output_of(capsys, "metrics", str(run), code=1)[1]
    assert f"{run}/metrics.jsonl: no metrics yet" in said
    record = MetricsFile(run / "metrics.jsonl")
    record.write("index add", {"rows": 7, "unit": "a,b"})
    for step, loss in ((1, 3.0), (2, 2.5), (3, 2.25), (2, 2.4), (3, float("nan")), (4, 0.1 + 0.2)):
        record.write("train", {"train/loss": loss, "train/grad_norm": None}, step=step)
    rows = list(csv.reader(output_of(capsys, "metrics", "--csv", str(run))[0].splitlines()))
    assert rows[0] == ["time", "stage", "step", "name", "value"]
    assert [row[1:] for row in rows[1:3]] == [["index add", "", "rows", "7"], ["index add", "", "unit", "a,b"]]
    assert [row[2:] for row in rows if row[3] == "train/loss"] == [
        ["1", "train/loss", "3.0"], ["2", "train/loss", "2.4"], ["3", "train/loss", ""],
        ["4", "train/loss", "0.30000000000000004"],
    ]  # fmt: skip
    assert {row[4] for row in rows if row[3] == "train/grad_norm"} == {""}
    table = [line.split() for line in output_of(capsys, "metrics", str(run))[0].splitlines()]
    assert ["index", "add", "rows", "1", "7"] in table and ["train", "train/loss", "4", "4", "0.3"] in table


def test_the_commands_there_are() -> None:
    assert {*every_command()} >= {
        *(verb.words for verb in STAGE_VERBS), *JOBS, "run", "plan", "report", "report words", "report frequency",
        "report clusters", "generate", "reproduce", "recipes", "config", "completion", "doctor", "import hf",
        "import fairseq", "import awd-lstm", "export hf", "memory bench", "index extend",
    }  # fmt: skip


@pytest.mark.parametrize("words", every_command())
def test_every_command_has_help_under_its_own_name(words: str, capsys: pytest.CaptureFixture) -> None:
    shown, _ = output_of(capsys, *words.split(), "--help")
    assert shown.startswith(f"usage: distlm {words} ")


def test_the_help_lists_every_first_word_and_imports_nothing_slow() -> None:
    program = (
        "import json, sys\nfrom distlm.cli import main\ntry:\n    main(['--help'])\n"
        "except SystemExit:\n    print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**ENVIRONMENT, **warm.COLD}, capture_output=True,
                          text=True, timeout=DEADLINE_S, check=True)  # fmt: skip
    shown, _, modules = done.stdout.rpartition("\n[")
    slow = {"jsonargparse", "docstring_parser", "rich", "numpy", "torch", "submitit", "launchers", "shtab", "faiss"}
    assert slow.isdisjoint(json.loads(f"[{modules}"))
    listed = {line.split()[0] for line in shown.splitlines() if line.startswith("    ") and line[4] != " "}
    assert {words.split()[0] for words in every_command()} <= listed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["index", "biuld"], "invalid choice: 'biuld'"),
        ([], "required: VERB"),
        (["recipes", "demo"], "`distlm recipes` takes no 'demo'"),
        (["report", "frequency"], "needs runs"),
        (["reproduce"], "expected one experiment, found none"),
        (["completion", "powershell"], "invalid choice: 'powershell'"),
        (["status"], "required: RUN_DIR_OR_RECIPE"),
        (["submit"], "expected one recipe, file or run directory, found none"),
        (["submit", "demo", "--fast"], "unknown argument '--fast'"),
    ],
)
def test_what_is_no_command_is_a_usage_error(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert words in output_of(capsys, *arguments, code=2)[1]


def test_options_may_stand_between_recipe_and_settings(capsys: pytest.CaptureFixture) -> None:
    shown = [
        output_of(capsys, "generate", *words, "--print-config")
        for words in (["demo", "train.lr=0.5"], ["train.lr=0.5", "--greedy", "demo"], ["--train.lr=0.5", "--tokens",
                      "3", "demo"])
    ]  # fmt: skip
    assert shown[0] == shown[1] == shown[2] and "lr: 0.5" in shown[0][0]


def test_report_words_is_a_command_beside_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its words are read as they are given; the recipe comes after them."""
    settings = [*TINY, f"run_dir={tmp_path / 'run'}"]
    assert (
        "no losses of split valid"
        in output_of(capsys, "report", "words", "demo", *settings, "--before", "lm", code=1)[1]
    )
    assert "'demo', 'words'" in output_of(capsys, "report", "demo", "words", code=2)[1]


@pytest.mark.parametrize(
    "words",
    [
        ["site", "show"], ["site", "flags", "train"], ["site", "setup"], ["status", "RUN"], ["status", "RUN", "--json"],
        ["cancel", "RUN"], ["logs", "RUN"], ["requeue", "RUN"], ["submit", "RUN", "--dry-run", "--cluster", "local"],
        ["submit", "RUN", "train.lrr=1"], ["site", "flags", "trian"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_jobs_of_runs_are_verbs_too(
    words: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("DISTLM_SITE", raising=False)
    given = [str(run) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as end:
        main(given)
    ours = capsys.readouterr()
    module = __import__(f"launchers.{given[0]}", fromlist=["main"])
    with pytest.raises(SystemExit) as theirs_end:
        module.main(given[1:])
    theirs = capsys.readouterr()
    assert (end.value.code or 0, ours.out) == (theirs_end.value.code or 0, theirs.out)
    assert ours.err == theirs.err.replace(f"launchers.{given[0]}: ", "distlm: ")


def test_jobs_are_looked_after_where_the_environment_is_of_other_ranks(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("DISTLM_RANKS", "4")
    assert "world" in output_of(capsys, "config", "demo", code=1)[1]
    assert str(run) in output_of(capsys, "status", str(run))[0]


def completed(tmp_path: Path, script: str, *words: str) -> set[str]:
    """What bash offers for the last word, in a folder with a file and a run."""
    (tmp_path / "completion.bash").write_text(script, "utf-8")
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "runs").mkdir(exist_ok=True)
    array = " ".join(f"'{word}'" for word in words)
    program = (
        f'source completion.bash; compopt() {{ echo "# compopt $*"; }}; COMP_WORDS=({array}); '
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _distlm; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return set(done.stdout.split("\n")) - {""}


def test_bash_completes_verbs_options_recipes_settings_and_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script, _ = output_of(capsys, "completion", "bash")
    assert {"train", "index", "status", "import"} <= completed(tmp_path, script, "distlm", "")
    assert completed(tmp_path, script, "distlm", "index", "ex") == {"extend"}
    assert completed(tmp_path, script, "distlm", "import", "f") == {"fairseq"}
    assert {"wikitext2", "wikitext2-small", "wikitext103"} <= completed(tmp_path, script, "distlm", "train", "wiki")
    assert completed(tmp_path, script, "distlm", "train", "min") == {"mine.yaml"}
    assert completed(tmp_path, script, "distlm", "train", "demo", "run") == {"runs", "run_dir="}
    assert {"train.lr=", "train.l2_weight="} <= completed(tmp_path, script, "distlm", "train", "demo", "train.l")
    # No blank behind the one setting that is left.
    assert completed(tmp_path, script, "distlm", "train", "demo", "train.upd") == {
        "train.updates=", "# compopt -o nospace",
    }  # fmt: skip
    assert completed(tmp_path, script, "distlm", "report", "wo") == {"words"}
    assert completed(tmp_path, script, "distlm", "report", "min") == {"mine.yaml"}
    assert completed(tmp_path, script, "distlm", "report", "words", "--sp") == {"--split"}
    assert completed(tmp_path, script, "distlm", "status", "--js") == {"--json"}


def test_zsh_gets_a_script_of_its_own(capsys: pytest.CaptureFixture) -> None:
    script, _ = output_of(capsys, "completion", "zsh")
    assert script.startswith("#compdef distlm") and "_distlm_words() {" in script and "train.updates=" in script
    # Every word behind the verb, not the first alone; of `report` those and its commands.
    assert '"(*)::' not in script and script.count('settings, in any order:_distlm_words"') > 20
    assert "_describe 'distlm report commands' _commands\n  _distlm_words\n" in script
