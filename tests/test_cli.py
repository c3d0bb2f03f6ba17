"""The command line: exit codes, messages, options in any order."""

import json

import pytest
import yaml
from support import TINY, distlm, write_text

from distlm.cli import main
from distlm.config.load import load_config
from distlm.config.recipe import recipe_names
from distlm.runtime.rundir import RunDir


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train"], 2, "expected one recipe, file or run directory"),
        (["train", "demo", "other"], 2, "'demo', 'other'"),
        (["train", "dmeo"], 2, "did you mean 'demo'"),
        (["train", "demo", "train.lrr=1"], 2, "did you mean 'train.lr'"),
        (["train", "demo", "--fast"], 2, "--fast"),
        (["trian", "demo"], 2, "invalid choice"),
        (["config", "demo"], 0, ""),
        (["--version"], 0, ""),
    ],
)
def test_exit_codes_and_messages(arguments, code, words):
    done = distlm(*arguments, check=False)
    assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr


def test_settings_may_stand_before_between_and_after():
    orders = [
        ["train.lr=0.5", "train", "demo"],
        ["train", "train.lr=0.5", "demo", "--print-config"],
        ["train", "--print-config", "demo", "train.lr=0.5"],
        ["train", "demo", "--print-config", "--train.lr=0.5"],
    ]
    results = [distlm(*order, check=False) for order in orders[1:]]
    assert {done.stdout for done in results} == {results[0].stdout}
    assert "lr: 0.5" in results[0].stdout


def test_doctor_reports_world_and_packages_as_json():
    done = distlm("doctor", "--json", check=False)
    report = json.loads(done.stdout)
    names = {check["name"]: check for check in report["checks"]}
    assert {"python", "torch", "deepspeed", "faiss", "world", "mpi", "gloo", "disk", "shm", "ds-ops"} <= set(names)
    assert "from single" in names["world"]["text"]
    assert done.returncode == (0 if report["healthy"] else 1)


def test_doctor_fails_on_an_interface_that_is_not_there():
    from support import mpirun

    done = mpirun(1, ["-m", "distlm", "doctor"], check=False, GLOO_SOCKET_IFNAME="nowhere0")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("gloo "))
    assert line.split()[1] == "fail" and "nowhere0" in line and "-> set it to one of" in line


def test_a_refusal_is_printed_once_by_two_ranks(tmp_path):
    text = write_text(tmp_path / "text")
    settings = [*TINY, "data.source=folder", f"data.text_dir={text}", f"run_dir={tmp_path / 'run'}"]
    distlm("data", "prepare", "demo", *settings)
    done = distlm("datastore", "write", "demo", *settings, ranks=2, check=False)
    assert done.returncode == 1
    assert done.stderr.count("no trained model yet") == 1, done.stderr


def test_a_dry_run_does_nothing(tmp_path):
    text = write_text(tmp_path / "text")
    settings = [*TINY, "data.source=folder", f"data.text_dir={text}", f"run_dir={tmp_path / 'run'}"]
    done = distlm("run", "demo", *settings, "--dry-run")
    for stage in ("data prepare", "train", "datastore write", "index build", "knn search"):
        assert f"distlm {stage} demo" in done.stdout, done.stdout
    assert "disk" in done.stdout and "memory/rank" in done.stdout and "time about" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_refused_setting_does_not_lock_the_run_directory(tmp_path):
    text = write_text(tmp_path / "text")
    settings = [*TINY, "data.source=folder", f"run_dir={tmp_path / 'run'}"]
    assert distlm("data", "prepare", "demo", *settings, "data.text_dir=/nowhere", check=False).returncode == 1
    distlm("data", "prepare", "demo", *settings, f"data.text_dir={text}")
    wrong = [*settings, f"data.text_dir={text}", "train.tap=nothing"]
    assert distlm("train", "demo", *wrong, check=False).returncode == 2
    distlm("train", "demo", *settings, f"data.text_dir={text}", "train.updates=1")


def run_of(folder, *settings):
    """A run directory of the demo recipe, in which no stage has run."""
    config = load_config("demo", [*TINY, *settings, f"run_dir={folder}"])
    RunDir(folder).open_stage(config, "prepare")
    return folder


def output_of(capsys, *arguments, code=0):
    """Both streams of a command in this process."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    found = capsys.readouterr()
    assert (end.value.code or 0) == code, found.err
    return found


@pytest.mark.parametrize(
    "words",
    [
        "data prepare", "train", "evaluate", "datastore write", "datastore verify", "datastore info", "index build",
        "index info", "knn search", "knn tune", "knn evaluate", "run", "plan", "report", "report words", "generate",
    ],
)  # fmt: skip
def test_a_run_directory_is_an_argument_of_every_verb(words, tmp_path, capsys):
    run = run_of(tmp_path / "runs", "train.lr=0.125", "data.source=demo").rename(tmp_path / "moved")
    settings = output_of(capsys, *words.split(), str(run), "train.updates=400", "--print-config").out
    found = yaml.safe_load(settings)
    assert (found["run_dir"], found["train"]["lr"], found["train"]["updates"]) == (str(run), 0.125, 400)


def test_a_folder_that_is_no_run_is_one_usage_error(tmp_path, capsys):
    error = output_of(capsys, "report", str(tmp_path), code=2).err
    assert error.startswith(f"distlm: {tmp_path}: a folder without config.yaml") and error.count("\n") == 1


def test_a_dry_run_of_a_run_directory_shows_commands_of_it(tmp_path, capsys):
    run = run_of(tmp_path / "run", "data.source=demo")
    shown = output_of(capsys, "run", str(run), "train.updates=400", "--dry-run").out
    assert f"distlm train {run} train.updates=400" in shown and f"distlm knn search {run} train.updates=400" in shown


def test_a_stage_that_was_refused_leaves_the_run_directory_as_it_was(tmp_path, capsys):
    """Or the next start would have the refused setting, though it does not say so."""
    text = write_text(tmp_path / "text")
    run = run_of(tmp_path / "run", "data.source=folder", f"data.text_dir={text}")
    error = output_of(capsys, "data", "prepare", str(run), "data.text_dir=/nowhere", code=1).err
    assert "/nowhere" in error
    assert load_config(str(run)).data.text_dir == str(text)
    output_of(capsys, "data", "prepare", str(run))
    assert output_of(capsys, "data", "prepare", str(run), "data.max_words=9", code=1).err.count("data.max_words") == 1
    assert load_config(str(run)).data.max_words == 12000


def test_recipes_are_listed_with_a_line_each(capsys):
    lines = output_of(capsys, "recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert "WikiText-2" in next(line for line in lines if line.startswith("wikitext2 "))


def test_config_prints_what_differs_from_the_defaults(tmp_path, capsys):
    run = run_of(tmp_path / "run")
    assert yaml.safe_load(output_of(capsys, "config", str(run), "--diff").out)["run_dir"] == str(run)
    changed = yaml.safe_load(output_of(capsys, "config", "wikitext103", "--diff", "launch.ranks=1").out)
    assert set(changed) == {"name", "knn"}
    assert "momentum: 0.99" in output_of(capsys, "config", "wikitext103").out
