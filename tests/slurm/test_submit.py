"""`python -m launchers.submit` on a real Slurm: the whole graph, training stopped and killed on the way, and refusals.

One run carries most of it: its training is stopped three times as a time limit or a preemption would, and once loses a
rank; the datastore is an array. Everything it leaves must be what a plain `distlm run` leaves.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, TINY, distlm, write_text
from support.deadline import DEADLINE_S, until
from support.present import present
from support.slurm import LOST_AFTER

SITE = """
gpus_per_node: 0
cpus_per_task: 1
time: 120
env: {SITE_SAYS: hello}
stages:
  datastore: {array: 2}
"""
UPDATES = 300


def settings(text: Path, run: Path, *more: str) -> list[str]:
    return [*TINY, f"train.updates={UPDATES}", "train.valid_every=150", "train.save_every=0", "data.source=folder",
            f"data.text_dir={text}", f"run_dir={run}", LOST_AFTER, *more]  # fmt: skip


def submit(slurm, *words, check=True):
    return slurm.run(sys.executable, "-m", "launchers.submit", "demo", *words, check=check)


def jobs_of(run: Path) -> dict[str, str]:
    """Name → id of the last submission, from the record in the run directory."""
    lines = [json.loads(line) for line in (run / "launch" / "jobs.jsonl").read_text("utf-8").splitlines()]
    return {line["name"]: line["job"] for line in lines}


def logged(run: Path, name: str = "train/loss") -> dict[int, object]:
    """Update → value; of two lines for one update the later."""
    path, found = run / "metrics.jsonl", {}
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # being written
            continue
        if name in line and "step" in line:
            found[line["step"]] = line[name]
    return found


def disturb(slurm, run: Path, job: str, act) -> None:
    """Wait until this start has done 10 updates, act, and wait for the requeue."""

    def lines() -> int:
        record = run / "metrics.jsonl"
        return record.read_text("utf-8").count('"train/loss"') if record.exists() else 0

    written = lines()
    slurm.until_in(job, lambda: lines() >= written + 10, "10 updates")
    before = slurm.restarts(job)
    act()
    until(lambda: slurm.restarts(job) > before, lambda: f"a requeue\n{slurm.output(job)}", pause=0.1)


def kill_rank_1(slurm, run: Path) -> None:
    """SIGKILL to the process of rank 1, on its node."""
    file = max(run.glob(".alive/*/rank-00001.json"), key=lambda path: path.stat().st_mtime)
    rank = json.loads(file.read_text("utf-8"))
    slurm.on(rank["node"], "kill", "-KILL", rank["pid"])


@pytest.fixture(scope="module")
def whole(module_slurm, tmp_path_factory):
    """The disturbed run over Slurm (its output, run directory, jobs) and the plain one."""
    slurm, folder = module_slurm, tmp_path_factory.mktemp("submit")
    text, run, plain = write_text(folder / "text", train_lines=600), folder / "run", folder / "plain"
    (folder / "site.yaml").write_text(SITE, "utf-8")
    said = submit(slurm, *settings(text, run), f"--site={folder / 'site.yaml'}", "--nodes=2").stdout
    jobs = jobs_of(run)
    slurm.jobs += jobs.values()
    undisturbed = subprocess.Popen(
        [sys.executable, "-m", "distlm", "run", "demo", *settings(text, plain, "launch.ranks=2")],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        train = jobs["train"]
        disturb(slurm, run, train, lambda: slurm.signal(train, "USR2"))
        disturb(slurm, run, train, lambda: slurm.signal(train, "USR2"))
        disturb(slurm, run, train, lambda: slurm.signal(train, "TERM"))
        disturb(slurm, run, train, lambda: kill_rank_1(slurm, run))
        errors = undisturbed.communicate(timeout=DEADLINE_S)[1]
        assert undisturbed.returncode == 0, errors
    finally:
        undisturbed.kill()
    for job in jobs.values():
        slurm.done(job)
    return said, run, jobs, plain


def test_it_says_what_was_submitted_and_how_to_follow_it(whole):
    said, run, jobs, _ = whole
    assert list(jobs) == ["prepare", "train", "datastore-shares", "datastore", "index-train", "index-add",
                          "index-merge", "search", "evaluate"]  # fmt: skip
    assert f"run directory: {run}" in said
    for name, job in jobs.items():
        assert f"job {job}: {name}, " in said
    assert f"2 rank(s) on 2 node(s), after {jobs['prepare']} (prepare)" in said
    followed = Path(present(re.search(r"tail -F (\S+)", said))[1])
    assert "rank 0 of 1" in followed.read_text("utf-8")
    # One folder for the files of this submission, a log for each rank.
    assert followed.parent.parent == run / "launch" / "submitit" and len(list(followed.parent.parent.iterdir())) == 1
    assert (followed.parent / f"{jobs['train']}_1_log.out").exists()


def test_training_was_requeued_and_ends_with_the_weights_of_an_undisturbed_run(whole, module_slurm):
    _, run, jobs, plain = whole
    assert module_slurm.restarts(jobs["train"]) >= 4
    for name in ("model.safetensors", "optimizer.safetensors"):
        ends = [(root / "checkpoints" / f"step-{UPDATES:08d}" / name).read_bytes() for root in (run, plain)]
        assert ends[0] == ends[1], name
    assert logged(run) == logged(plain) and list(logged(run)) == list(range(1, UPDATES + 1))
    # The chain over the batches: none was lost, repeated or exchanged.
    assert logged(run, "train/data_fingerprint")[UPDATES] == logged(plain, "train/data_fingerprint")[UPDATES]


def test_each_requeue_has_one_owner_who_is_named(whole):
    _, run, jobs, _ = whole
    lines = [json.loads(text) for text in (run / "launch" / "attempts-train.jsonl").read_text("utf-8").splitlines()]
    owners = [line["owner"] for line in lines]
    # A busy machine may lose a rank once more than the test kills one.
    assert owners.count("task") >= 3 and owners.count("batch script") >= 1
    assert {line["job"] for line in lines} == {jobs["train"]}
    assert [line["restarts"] for line in lines] == list(range(len(lines)))
    (log,) = run.glob(f"launch/submitit/*/{jobs['train']}_0_log.out")
    text = log.read_text("utf-8")
    assert "requeue: this task owns it" in text and "requeue: this batch script owns it" in text
    assert re.search(r"rank 1 on \S+ is lost: no sign of life", text)
    # What Slurm gives to a rank, in the words of every front.
    assert re.search(r"train: rank 0 of 2 on \S+ \(from slurm\)", text)


def test_an_array_of_shares_gives_the_same_datastore(whole):
    _, run, jobs, plain = whole
    for share in range(2):
        (log,) = run.glob(f"launch/submitit/*/{jobs['datastore-shares']}_{share}_0_log.out")
        assert "Job completed successfully" in log.read_text("utf-8")
    files = sorted(path.name for path in (plain / "datastore").iterdir() if not path.name.startswith("."))
    assert files == sorted(path.name for path in (run / "datastore").iterdir() if not path.name.startswith("."))
    assert all((run / "datastore" / name).read_bytes() == (plain / "datastore" / name).read_bytes() for name in files)


def test_results_are_those_of_a_plain_run(whole):
    _, run, _, plain = whole
    results = [json.loads((root / "results.json").read_text("utf-8")) for root in (run, plain)]
    for found in results:
        # Where it lay, how long it took, and which copy of the code it was.
        del found["model"]["checkpoint"], found["seconds"], found["code"], found["check"]
    assert results[0] == results[1]
    assert (run / "report.html").exists()


def test_the_same_command_again_has_nothing_to_do(whole, module_slurm):
    _, run, _, _ = whole
    text = run.parent / "text"
    assert "complete; nothing to submit" in submit(module_slurm, *settings(text, run), "--nodes=2").stdout
    other = submit(module_slurm, *settings(text, run), "train.seed=7", check=False)
    assert other.returncode == 1 and "train.seed: 1 there, 7 now" in other.stderr


def test_from_inside_a_job_and_twice(slurm, tmp_path):
    """A job may submit: nothing of its own world reaches the new job. A run directory takes one submission at once."""
    text, run = write_text(tmp_path / "text"), tmp_path / "run"
    (tmp_path / "site.yaml").write_text("gpus_per_node: 0\ncpus_per_task: 1\ntime: 120\nextra: [--hold]\n", "utf-8")
    words = [*settings(text, run), f"--site={tmp_path / 'site.yaml'}", "--stages=prepare"]
    step = ["srun", "--nodes=2", "--ntasks-per-node=2", "--time=120", "--mem=50", "--mpi=none", "--quiet"]
    first = [sys.executable, "-m", "launchers.submit", "demo", *words]
    only = 'if [ $SLURM_PROCID = 3 ]; then RANK=3 WORLD_SIZE=4 SUBMITIT_EXECUTOR=slurm exec "$@"; fi'
    slurm.run(*step, "sh", "-c", only, "sh", *first)
    job = jobs_of(run)["prepare"]
    slurm.jobs.append(job)
    shown = slurm.show(job)
    assert (shown["NumNodes"], shown["TimeLimit"], shown["JobState"]) == ("1-1", "02:00:00", "PENDING")
    again = submit(slurm, *words, check=False)
    assert again.returncode == 1 and f"jobs {job} of an earlier submission still wait or run" in again.stderr
    slurm.run("scontrol", "release", job)
    slurm.done(job)
    assert "complete; nothing to submit" in submit(slurm, *words).stdout


def test_asking_first_and_being_refused_leave_nothing_behind(slurm, tmp_path):
    text, run = write_text(tmp_path / "text"), tmp_path / "run"
    site = tmp_path / "site.yaml"
    site.write_text("gpus_per_node: 0\ncpus_per_task: 1\ntime: 120\n", "utf-8")
    words = [*settings(text, run), f"--site={site}", "--stages=prepare,train"]
    asked = submit(slurm, *words, "--nodes=2", "--test-only").stdout
    assert re.search(r"train: Job \d+ to start at \S+ using 2 processors on nodes node\[\d-\d\]", asked)
    assert not run.exists()
    site.write_text(f"{site.read_text('utf-8')}stages: {{train: {{partition: nonesuch}}}}\n", "utf-8")
    refused = submit(slurm, *words, "--test-only", check=False)
    assert refused.returncode == 1 and "sbatch refuses train: " in refused.stderr
    assert "invalid partition" in refused.stderr and not run.exists()
    refused = submit(slurm, *words, check=False)
    assert refused.returncode == 1 and "nothing is left submitted" in refused.stderr
    assert "sbatch refused train: " in refused.stderr and "Traceback" not in refused.stderr
    # The stage before it was submitted by then.
    assert slurm.wait(jobs_of(run)["prepare"]) == "CANCELLED"


@pytest.mark.slow
def test_the_real_time_limit_requeues_without_loss(slurm, tmp_path):
    """One minute a start. Slurm looks every 30 s, so its signal comes 15 s to 45 s after the start."""
    text, run, plain = write_text(tmp_path / "text", train_lines=600), tmp_path / "run", tmp_path / "plain"
    (tmp_path / "site.yaml").write_text("gpus_per_node: 0\ncpus_per_task: 1\nsignal_lead_s: 15\n", "utf-8")
    # Longer than three starts also on a fast machine.
    long = ["train.updates=14000", "train.valid_every=0", "train.log_every=100"]
    words = [*settings(text, run, *long), f"--site={tmp_path / 'site.yaml'}", "--stages=prepare,train"]
    submit(slurm, *words, "--nodes=2", "--time=1")
    jobs = jobs_of(run)
    slurm.jobs += jobs.values()
    train = jobs["train"]
    until(lambda: slurm.restarts(train) >= 3, lambda: f"three requeues\n{slurm.output(train)}", pause=1)
    slurm.run("scontrol", "update", f"jobid={train}", "timelimit=120")
    slurm.done(train)
    for verb, ranks in ((("data", "prepare"), 1), (("train",), 2)):
        distlm(*verb, "demo", *settings(text, plain, *long), ranks=ranks)
    ends = [(root / "checkpoints" / "step-00014000" / "model.safetensors").read_bytes() for root in (run, plain)]
    assert ends[0] == ends[1]
