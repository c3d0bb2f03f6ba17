"""The site file: found, typed, refused with the nearest name, and turned into sbatch flags and shell lines."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ENVIRONMENT
from support.deadline import DEADLINE_S

from distlm.errors import UsageError
from launchers.site import STAGES, Site, StageSettings, load_site, parse_site, sbatch_flags, show


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder without a site file, and a home without one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DISTLM_SITE", raising=False)
    return tmp_path


def test_without_a_file_the_defaults_are_v100_nodes(nowhere):
    site, source = load_site()
    assert source == "built-in defaults" and site == Site()
    train = site.resources("train")
    assert (train.nodes, train.tasks_per_node, train.gpus_per_node, train.cpus_per_task) == (1, 4, 4, 10)
    assert train.time == 24 * 60
    # One rank that needs no GPU must not hold a node of them.
    assert (site.resources("prepare").tasks_per_node, site.resources("evaluate").gpus_per_node) == (1, 0)


def test_files_are_found_in_order(nowhere, monkeypatch):
    home = nowhere / ".config" / "distlm"
    home.mkdir(parents=True)
    for path, partition in ((home / "site.yaml", "home"), (nowhere / "env.yaml", "env"), (nowhere / "cli.yaml", "cli")):
        path.write_text(f"partition: {partition}\n", "utf-8")
    assert load_site()[0].partition == "home"
    (nowhere / "site.yaml").write_text("partition: here\n", "utf-8")
    assert load_site()[0].partition == "here"
    monkeypatch.setenv("DISTLM_SITE", "env.yaml")
    assert load_site()[0].partition == "env"
    assert load_site("cli.yaml") == (Site(partition="cli"), "cli.yaml")
    with pytest.raises(UsageError, match=r"site file other\.yaml: no such file \(--site\)"):
        load_site("other.yaml")
    monkeypatch.setenv("DISTLM_SITE", "gone.yaml")
    with pytest.raises(UsageError, match=r"gone\.yaml: no such file \(\$DISTLM_SITE\)"):
        load_site()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "unknown key 'partitoin'; did you mean 'partition'?"),
        ("stages: {trian: {nodes: 2}}", "unknown stage 'trian'; did you mean 'train'?"),
        ("stages: {train: {node: 2}}", "unknown key 'stages.train.node'; did you mean 'nodes'?"),
        ("time: 24:00:00", "time='24:00:00': expected a whole number of minutes"),
        ("cpus_per_task: ten", "cpus_per_task='ten': expected a whole number"),
        ("stages: {train: {nodes: 0}}", "stages.train.nodes=0: expected 1 or more"),
        ("setup: module load cuda", "setup='module load cuda': expected a list of texts"),
        ("env: [A=1]", "expected NAME: value lines"),
        ("partition: [a, b]", "expected text"),
        ("extra: [-C v100]", "extra: '-C v100': expected --name or --name=value"),
        ("stages: {train: {extra: ['--comment=two words']}}", "stages.train.extra: '--comment=two words'"),
        ("gpus_per_node: v100:4", "gpus_per_node='v100:4': expected a whole number; the type goes into gpu_type"),
        ("extra: ['--dependency=afterok:1']", "the plan sets --dependency itself; use after in the site file"),
        ("extra: [--gres=gpu:v100:4]", "the plan sets --gres itself; use gpus_per_node and gpu_type in the site file"),
        ("extra: [--part=gpu]", "extra: '--part=gpu': the plan sets --partition itself; use partition"),
        ("extra: [--no-requeue]", "the plan sets --no-requeue itself; remove it"),
        ("extra: [--chdir=/home]", "the plan sets --chdir itself; remove it"),
        ("stages: {train: {extra: [--nodes=2]}}", "stages.train.extra: '--nodes=2': the plan sets --nodes itself"),
        ("srun: [--mpi=pmi2]", "srun: '--mpi=pmi2': the plan sets --mpi itself; use mpi in the site file"),
        ("srun: [-n4]", "srun: '-n4': expected --name or --name=value"),
        ("after: ['5']", "after: '5': expected a condition of sbatch --dependency, as afterok:123"),
        ('python: "it\'s"', 'python="it\'s": No closing quotation'),
        ("stages: {train: 4}", "stages.train: expected keys, found '4'"),
        ("- a", "site file: expected keys"),
        ("a: [", "not valid YAML"),
        ("srun: [--a]\nsrun: [--b]", "the key 'srun' is there twice (line 2)"),
        ("stages: {train: {nodes: 1, nodes: 2}}", "the key 'nodes' is there twice (line 1)"),
    ],
)
def test_mistakes_are_named_with_the_mend(nowhere, text, message):
    (nowhere / "site.yaml").write_text(text, "utf-8")
    with pytest.raises(UsageError) as caught:
        load_site()
    assert message in str(caught.value) and str(caught.value).startswith("site.yaml: ")


def test_values_stay_as_they_are_written(nowhere):
    """YAML alone would make 83 of 0123, False of no and None of an empty value."""
    (nowhere / "site.yaml").write_text("account: 0123\nmpi: none\nqos: no\nmem: 0\nenv: {A: 1e3}\n", "utf-8")
    site, _ = load_site()
    assert (site.account, site.mpi, site.qos, site.mem, site.env) == ("0123", "none", "no", "0", {"A": "1e3"})


def test_a_stage_takes_what_it_does_not_name_from_the_site():
    tree = {"gpus_per_node": "8", "cpus_per_task": "6", "extra": ["--exclusive"], "stages": {
        "train": {"nodes": "4", "time": "60", "extra": ["--comment=x"]}, "index-add": {"gpus_per_node": "0"},
    }}  # fmt: skip
    site = parse_site(tree, "test")
    train, add = site.resources("train"), site.resources("index-add")
    assert (train.nodes, train.tasks_per_node, train.gpus_per_node, train.time) == (4, 8, 8, 60)
    assert train.extra == ("--exclusive", "--comment=x")
    assert (add.nodes, add.tasks_per_node, add.gpus_per_node, add.cpus_per_task) == (1, 1, 0, 6)


def test_flags_are_one_line_that_the_shell_may_split():
    site = Site(partition="gpu", constraint="v100|p100", mem="64G", stages={"train": StageSettings(nodes=2)})
    assert sbatch_flags(site, "train") == [
        "--partition=gpu", "--constraint=v100|p100", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=10",
        "--gpus-per-node=4", "--time=1440", "--signal=USR1@120", "--mem=64G",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="blanks"):
        sbatch_flags(Site(account="my project"), "train")


def test_flags_beside_the_plans_own_and_places_of_stages_are_taken():
    site = parse_site(
        {
            "partition": "gpu", "gpu_type": "v100", "extra": ["--exclusive", "--gres=lscratch:100", "--mem-bind=local"],
            "after": ["afterok:5:6", "afterany:7_1", "singleton"],
            "stages": {"prepare": {"partition": "cpu"}, "train": {"gpu_type": "a100", "gpus_per_node": "2"}},
        },
        "test",
    )  # fmt: skip
    assert "--partition=cpu" in sbatch_flags(site, "prepare") and "--gpus-per-node=0" in sbatch_flags(site, "prepare")
    assert {"--partition=gpu", "--gpus-per-node=a100:2"} <= {*sbatch_flags(site, "train")}
    assert {"--gpus-per-node=v100:4", "--exclusive"} <= {*sbatch_flags(site, "search")}


def test_setup_is_shell_that_can_be_evaluated(nowhere):
    (nowhere / "site.yaml").write_text(
        "setup: ['X=1']\nenv: {GREETING: \"it's $HOME\"}\nmpi: pmi2\n"
        "srun: [--cpu-bind=cores, '--comment=two words']\npython: /shared/run python3\n",
        "utf-8",
    )
    lines = site_command("setup")
    assert lines.returncode == 0
    echoed = subprocess.run(
        [
            "bash",
            "-c",
            f'{lines.stdout}\necho "$X $GREETING $SLURM_MPI_TYPE ${{#SRUN[@]}} ${{SRUN[0]}} ${{PYTHON[@]}}"',
        ],
        capture_output=True,
        text=True,
    )
    assert echoed.stdout == "1 it's $HOME pmi2 2 --cpu-bind=cores /shared/run python3\n"


def test_the_command_shows_refuses_and_exits(nowhere):
    shown = site_command("show")
    assert "from built-in defaults" in shown.stdout and all(stage in shown.stdout for stage in STAGES)
    wrong = site_command("flags", "trian")
    assert wrong.returncode == 2 and "did you mean 'train'?" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    "failure", [RuntimeError("Could not determine home directory."), PermissionError(13, "denied")]
)
def test_a_home_that_is_not_there_holds_no_site_file(nowhere, monkeypatch, failure):
    """A container without HOME and without a name for the user; somebody else's home."""
    real = Path.expanduser

    def homeless(path):
        if str(path).startswith("~"):
            raise failure
        return real(path)

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert load_site()[1] == "built-in defaults"
    with pytest.raises(UsageError, match=r"site file ~/mine.yaml: no such file"):
        load_site("~/mine.yaml")
    (nowhere / "site.yaml").write_text("partition: here\n", "utf-8")
    assert load_site()[0].partition == "here"


def test_show_can_be_read_back():
    site = Site(partition="gpu", env={"A": "1"}, stages={"train": StageSettings(nodes=2, extra=["--exclusive"])})
    assert parse_site(yaml.load(show(site, "test"), yaml.BaseLoader), "shown") == site


def site_command(*words):
    return subprocess.run(
        [sys.executable, "-m", "launchers.site", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def test_a_place_for_copies_is_handed_on_with_its_variables_unread():
    site = parse_site({"stage_in": "$TMPDIR/copies of mine"}, "site.yaml")
    shell = "\n".join([*site.setup_lines(), 'printf %s "$DISTLM_STAGE_IN"'])
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout == "$TMPDIR/copies of mine"
    assert Site().setup_lines() == []
