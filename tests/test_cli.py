"""The command line: exit codes, messages, options in any order."""

import json

import pytest
from support import TINY, distlm, write_text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train"], 2, "expected one recipe or file"),
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
    assert "[FAIL] gloo" in done.stdout and "nowhere0" in done.stdout


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
