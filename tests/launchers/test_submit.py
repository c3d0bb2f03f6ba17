"""`python -m launchers.submit` without a Slurm: every generated script, the placement, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distlm.config.load import dump_config, load_config
from launchers import submit as command
from launchers.site import STAGES, Site, StageSettings
from launchers.stages.dispatch import clean_environment, tasks_of
from launchers.stages.graph import Wish, build_graph
from launchers.stages.render import Plan, executor, placement

GOLDEN = Path(__file__).with_name("golden")
# Everything a site file can say, with characters that a shell would take for its own.
FULL = Site(
    partition="gpu", account="lm", qos="long", constraint="v100|a100", reservation="spring", mpi="pmi2",
    gpus_per_node=8, cpus_per_task=6, mem="240G", time=600, signal_lead_s=300, max_same_start=5,
    setup=["module load cuda/12.6", "source $HOME/venv/bin/activate"], env={"NCCL_SOCKET_IFNAME": "^lo,docker0"},
    extra=["--exclusive", "--mail-type=END"],
    stages={
        "prepare": StageSettings(time=30, mem="16G"),
        "train": StageSettings(nodes=2),
        "datastore": StageSettings(array=16),
        "index-add": StageSettings(array=4, gpus_per_node=0, cpus_per_task=20),
        "index-merge": StageSettings(gpus_per_node=0, tasks_per_node=2, extra=["--nice=100"]),
    },
)  # fmt: skip
CASES = {"v100": (Site(), Wish(nodes=2)), "full": (FULL, Wish())}


def plan(case):
    site, wish = CASES[case]
    config = load_config("demo", ["run_dir=/RUN", "train.blocks_per_update=32", "train.micro_blocks=1"])
    launch = Path("/RUN/launch")
    return Plan(
        config, site, build_graph(config, site, STAGES, wish), launch / "recipe-HASH.yaml", launch / "submitit/STAMP",
        Path("/RUN/code/HASH"), Path("/home/of user"),
    )  # fmt: skip


def jobs():
    return [(case, job) for case in CASES for job in plan(case).jobs]


@pytest.mark.parametrize(("case", "job"), jobs(), ids=lambda value: getattr(value, "name", value))
def test_every_generated_script_is_the_golden_one(case, job):
    """DISTLM_UPDATE_GOLDEN=1 writes them anew; read the difference before it is committed."""
    made = executor(plan(case), job, [f"<{name}>" for name in job.after])
    text = made.text(job.shares).replace(sys.executable, "PYTHON")
    path = GOLDEN / case / f"{job.name}.sbatch"
    if os.environ.get("DISTLM_UPDATE_GOLDEN") == "1":
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_no_golden_file_is_left_over():
    found = {(path.parent.name, path.stem) for path in GOLDEN.rglob("*.sbatch")}
    assert found == {(case, job.name) for case, job in jobs()}


def test_ranks_are_shown_with_node_and_gpu():
    train = next(job for job in plan("v100").jobs if job.name == "train")
    assert placement(train).splitlines() == [
        "train: 8 rank(s) on 2 node(s); distlm train",
        "  node 0  rank 0: GPU 0, rank 1: GPU 1, rank 2: GPU 2, rank 3: GPU 3",
        "  node 1  rank 4: GPU 0, rank 5: GPU 1, rank 6: GPU 2, rank 7: GPU 3",
    ]
    add = next(job for job in plan("full").jobs if job.name == "index-add-shares")
    assert "1 rank(s) on 1 node(s), array of 4" in placement(add) and placement(add).endswith("rank 0: CPU")


def test_shares_are_counted_from_zero():
    array = next(job for job in plan("full").jobs if job.name == "index-add-shares")
    assert [task.overrides for task in tasks_of(plan("full"), array)] == [(f"launch.share={k}/4",) for k in range(4)]


def test_a_new_job_inherits_nothing_of_the_one_that_submits_it():
    kept = {
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_ACCOUNT": "lm",
        "OMPI_MCA_osc": "^ucx",
        "PATH": "/bin",
        "HOME": "/",
    }
    dropped = ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_MEM_PER_NODE", "SUBMITIT_EXECUTOR", "SUBMITIT_LOCAL_NTASKS",
               "PMIX_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR",
               "MASTER_PORT", "TORCHELASTIC_RUN_ID", "DISTLM_RANKS"]  # fmt: skip
    assert clean_environment(kept | dict.fromkeys(dropped, "3")) == kept


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`launchers.submit demo WORDS` on a machine without Slurm and without a site file: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DISTLM_SITE", raising=False)

    def main(*words):
        with pytest.raises(SystemExit) as end:
            command.main(["demo", f"run_dir={tmp_path / 'run'}", *words])
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return main


def test_a_dry_run_needs_no_slurm_and_writes_nothing(run, tmp_path):
    code, out, err = run("--cluster=slurm", "--dry-run", "--ranks=2", "--array=3")
    assert code == 0 and not err
    assert out.count("#!/bin/bash") == 10 and out.count("--array=0-2%3") == 2
    assert "rank 0: GPU 0, rank 1: GPU 1; after prepare" in out
    assert "--dependency='afterok:<datastore-shares>'" in out
    assert f"PYTHONPATH={tmp_path / 'run' / 'code'}" in out and "requeue: submitit" in out
    assert list(tmp_path.iterdir()) == []
    assert f"PYTHONPATH={Path(command.__file__).parents[1]}$" in run("--cluster=slurm", "--dry-run", "--no-snapshot",
                                                                     "--ranks=2")[1]  # fmt: skip


def test_a_dry_run_shows_what_the_first_job_waits_for_and_where_a_stage_needs_no_more(run):
    code, out, _ = run("--cluster=slurm", "--dry-run", "--nodes=32", "--ranks=32", "train.blocks_per_update=32",
                       "train.micro_blocks=1", "--after=afterok:5", "--after=singleton")  # fmt: skip
    assert code == 0 and "rank 0: CPU; after afterok:5, singleton" in out
    assert out.count("--dependency=afterok:5,singleton") == 1
    assert "train: 32 rank(s) on 32 node(s)" in out
    assert "index-merge: 4 rank(s) on 1 node(s): all that it has work for" in out


def test_without_slurm_the_default_is_this_machine_and_its_ranks_are_the_recipes(run):
    code, out, _ = run("--dry-run")
    assert code == 0 and "front: local" in out and "train: 2 rank(s) on 1 node(s)" in out and "#!" not in out
    assert "train: 1 rank(s)" in run("--dry-run", "--cluster=debug")[1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--cluster=slurm"], 1, "sbatch: not found, so there is no Slurm on this machine"),
        (["--stages=trian"], 2, "--stages: unknown stage 'trian'; did you mean 'train'?"),
        (["--ranks=3"], 2, "do not divide over 3 ranks"),
        (["--cluster=slurm", "--dry-run", "--nodes=2", "--ranks=3"], 2, "3 ranks do not divide over 2 nodes"),
        (["--after=5", "--cluster=slurm", "--dry-run"], 2, "--after: '5': expected a condition of sbatch --dependency"),
        (["--after=afterok:5"], 2, "--after afterok:5: --cluster local knows no jobs of Slurm"),
        (["--nodes=2"], 2, "--cluster local is this one machine; use --ranks"),
        (["--cluster=debug", "--ranks=2"], 2, "--cluster debug runs one rank in this process"),
        (["--test-only"], 2, "--test-only asks Slurm, and the cluster is 'local'"),
        (["--stages=train", "--array=2"], 2, "--array 2: none of these stages can be an array"),
        (["--site=gone.yaml"], 2, "site file gone.yaml: no such file"),
        (["train.updatse=3"], 2, "unknown key 'train.updatse'; did you mean 'train.updates'?"),
        (
            ["--cluster=slurm", "--dry-run", "data.source=folder"],
            2,
            "data.text_dir is empty; set it to a folder with train",
        ),
        (["--cluster=slurm", "--dry-run", "knn.k=99999999"], 2, "knn.k=99999999: the datastore has about"),
        (["--rank=2"], 2, "unknown key 'rank'"),
        (["--rank"], 2, "unknown argument '--rank'"),
        (["wikitext103"], 2, "expected one recipe, file or run directory, found 'demo', 'wikitext103'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(run, tmp_path, words, code, message):
    found = run(*words)
    assert (found[0], found[1]) == (code, "") and message in found[2]
    assert found[2].startswith("launchers.submit: ") and found[2].count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_numbers_below_one_are_refused(run):
    assert "expected 1 or more" in run("--nodes=0")[2]


def test_a_run_directory_of_another_configuration_is_refused(run, tmp_path):
    config = tmp_path / "run" / "configs" / "train.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(dump_config(load_config("demo", ["train.seed=2"])), "utf-8")
    (tmp_path / "run" / "checkpoints" / "step-00000100").mkdir(parents=True)
    code, _, err = run("--dry-run")
    assert code == 1 and "train.seed: 2 there, 1 now" in err


def test_a_run_directory_is_submitted_as_its_recipe(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config("demo", ["run_dir=/elsewhere", "train.lr=0.5"])), "utf-8")
    with pytest.raises(SystemExit) as end:
        command.main([str(run), "train.updates=400", "--dry-run", "--cluster", "local"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and f"# run directory: {run}" in shown and "distlm train" in shown
    with pytest.raises(SystemExit) as end:
        command.main([str(tmp_path), "--dry-run"])
    assert end.value.code == 2 and "a folder without config.yaml" in capsys.readouterr().err
