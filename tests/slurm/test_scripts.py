"""Every script in slurm/ ends with the right result on 2 to 4 nodes: the files of a plain run, byte for byte.

The plain run trains on two ranks under mpirun (sums of fp32 depend on the number of ranks) and does the rest as one
process. Against it stand: the scripts one by one, a job each, chained by dependencies; the two arrays; and run.sbatch,
stopped once on its way. They are in the queue together.
"""

import json
import shutil
from pathlib import Path

import pytest
from support import TINY, distlm
from support.finetune import write_sst2
from support.kinds import readable
from support.plm import PLM
from support.slurm import FLAGS, ON_TWO, REQUEUED, RESULTS, SCRIPTS, outcome, recipe, script, write_corpus
from support.slurm.cluster import Slurm

ON_FOUR = ("--nodes=4", *FLAGS)
CHAIN = {
    "prepare": ("--cpus-per-task=1",),
    "train": ON_TWO,
    "datastore": ON_FOUR,
    "index-train": ON_TWO,
    "index-add": ("--nodes=2", "--ntasks=3", "--ntasks-per-node=2", *FLAGS[1:]),
    "index-merge": ON_TWO,
    "search": ON_FOUR,
    "evaluate": ("--cpus-per-task=1",),
}
"""Flags of each script, in order."""
SHARED = ("tokens", "checkpoints")
"""What the run of the arrays starts with."""


@pytest.fixture(scope="module")
def runs(module_slurm: Slurm) -> dict[str, tuple[Path, dict[str, str]]]:
    """Run directory and jobs of: plain, scripts, arrays, whole. All have ended well."""
    slurm, text = module_slurm, write_corpus(module_slurm.folder)
    words = {name: recipe(slurm.folder / name, text) for name in ("plain", "scripts", "arrays", "whole")}
    # Each node's own, as the variable of Slurm's task says.
    words["scripts"].append(f"launch.stage_in={slurm.folder}/disk-of-$SLURMD_NODENAME")
    jobs: dict[str, dict[str, str]] = {name: {} for name in words}
    jobs["whole"]["run"] = slurm.sbatch(*ON_TWO, script("run"), *words["whole"])
    submit_chain(slurm, jobs["scripts"], CHAIN, words["scripts"])
    # Stopped once the store has its first shard: the stop comes in the middle of a stage or between two.
    store = slurm.folder / "whole" / "datastore"
    slurm.until_in(jobs["whole"]["run"], lambda: list(store.glob("*.npy")), "a shard")
    slurm.signal(jobs["whole"]["run"], "USR1", "--batch")
    distlm("data", "prepare", *words["plain"])
    distlm("train", *words["plain"], ranks=2)
    for name in SHARED:
        shutil.copytree(slurm.folder / "plain" / name, slurm.folder / "arrays" / name)
    arrays: dict[str, tuple[str, ...]] = {
        "datastore-array": ("--array=0-2", *FLAGS), "datastore": ON_TWO, "index-train": ON_TWO,
        "index-add-array": ("--array=0-1", *FLAGS), "index-add": ON_TWO, "index-merge": ON_TWO,
    }  # fmt: skip
    submit_chain(slurm, jobs["arrays"], arrays, words["arrays"])
    masked = {name: masked_recipe(slurm.folder / name, text) for name in ("masked", "plain-masked")}
    jobs["masked"] = {}
    words |= masked
    shapes = {"shard": ON_TWO, "train": ON_TWO, "evaluate": CHAIN["evaluate"], "finetune": ON_TWO}
    submit_chain(slurm, jobs["masked"], shapes, masked["masked"])
    distlm("run", *words["plain"], "launch.ranks=1")
    distlm("run", *masked["plain-masked"], "launch.ranks=1")
    jobs["plain-masked"] = {}
    for each in jobs.values():
        for job in each.values():
            slurm.done(job)
    return {name: (slurm.folder / name, jobs[name]) for name in words}


def masked_recipe(run: Path, text: Path) -> list[str]:
    """A masked language model with a memory, its values' columns on all ranks, fine-tuned on a task."""
    glue = write_sst2(text.parent / "glue", train=32, dev=12)
    task = ["finetune.tasks=[SST-2]", f"finetune.data_dir={glue}", "finetune.seeds=[1]", "finetune.epochs=1",
            "finetune.rows_per_update=8", "finetune.length=24"]  # fmt: skip
    memory = ["memory.kind=resm", "memory.columns=0", "train.updates=6", "train.valid_every=3"]
    return ["plm-base", *readable([*TINY, *PLM, f"shards.text_dir={text}", f"run_dir={run}", *memory]), *task]


def submit_chain(slurm: Slurm, jobs: dict[str, str], flags: dict[str, tuple[str, ...]], words: list[str]) -> None:
    """One job per stage, each after the one before; `jobs` is filled with their ids."""
    for stage, shape in flags.items():
        after = [f"--dependency=afterok:{list(jobs.values())[-1]}"] if jobs else []
        jobs[stage] = slurm.sbatch(*after, *shape, script(stage), *words)


def test_every_script_is_run_here(runs: dict[str, tuple[Path, dict[str, str]]]) -> None:
    submitted = {f"{stage}.sbatch" for _, jobs in runs.values() for stage in jobs}
    assert submitted == {path.name for path in SCRIPTS.glob("*.sbatch")}


@pytest.mark.parametrize(
    ("name", "what"), [("scripts", RESULTS), ("whole", RESULTS), ("arrays", ("datastore", "index"))]
)
def test_the_files_of_a_plain_run(
    runs: dict[str, tuple[Path, dict[str, str]]], name: str, what: tuple[str, ...]
) -> None:
    plain, other = outcome(runs["plain"][0], what), outcome(runs[name][0], what)
    assert plain.keys() == other.keys()
    assert [path for path in plain if plain[path] != other[path]] == []
    assert len(plain) > 20


@pytest.mark.parametrize(("stage", "nodes"), [("index-add", 2), ("search", 4)])
def test_the_nodes_read_copies_on_disks_of_their_own(
    runs: dict[str, tuple[Path, dict[str, str]]], module_slurm: Slurm, stage: str, nodes: int
) -> None:
    """launch.stage_in of the run whose files are compared above: copied once a node, and nothing is left."""
    run, jobs = runs["scripts"]
    assert f"nodes that copied: {nodes}" in module_slurm.output(jobs[stage])
    disks = list(run.parent.glob("disk-of-node*"))
    assert len(disks) == 4 and [left for disk in disks for left in disk.iterdir()] == []


@pytest.mark.parametrize("name", ["scripts", "whole"])
def test_the_results_of_a_plain_run(runs: dict[str, tuple[Path, dict[str, str]]], name: str) -> None:
    plain, other = (json.loads((runs[run][0] / "results.json").read_text("utf-8")) for run in ("plain", name))
    # `model` names the folder of the checkpoint.
    assert {key for key in plain if plain[key] != other[key]} <= {"check", "model", "seconds"}
    assert plain["model"]["fingerprint"] == other["model"]["fingerprint"]
    assert (runs[name][0] / "report.html").exists()


def test_a_masked_language_model_from_shards_to_perplexity(runs: dict[str, tuple[Path, dict[str, str]]]) -> None:
    """The shards of one rank, to the byte, written by two; its perplexities, to rounding, from two."""
    plain, other = runs["plain-masked"][0], runs["masked"][0]
    shards = sorted(path.relative_to(plain) for path in (plain / "shards").rglob("*.tar"))
    assert len(shards) > 2 and all((plain / path).read_bytes() == (other / path).read_bytes() for path in shards)
    expected, found = (json.loads((run / "lm.json").read_text("utf-8"))["splits"] for run in (plain, other))
    for split in ("valid", "test"):
        assert expected[split]["tokens"] == found[split]["tokens"] > 50
        assert abs(expected[split]["loss_nats"] - found[split]["loss_nats"]) < 1e-4


def test_the_stopped_run_went_on_where_it_was(
    module_slurm: Slurm, runs: dict[str, tuple[Path, dict[str, str]]]
) -> None:
    job = runs["whole"][1]["run"]
    said = module_slurm.output(job)
    assert module_slurm.restarts(job) == 1
    assert "USR1 received, handed on" in said and REQUEUED in said
    assert (
        said.count("train: distlm train on 2 ranks") == 1 + said.count("index-train: distlm index train on 2 ranks") - 1
    )
    assert "prepare: distlm data prepare on 1 ranks" in said


def test_shares_divided_the_shards(module_slurm: Slurm, runs: dict[str, tuple[Path, dict[str, str]]]) -> None:
    _, jobs = runs["arrays"]
    for stage, count in (("datastore-array", 3), ("index-add-array", 2)):
        logs = sorted(module_slurm.folder.glob(f"distlm-{stage}-{jobs[stage]}_*_0.log"))
        assert len(logs) == count
        assert all("nothing to do" not in log.read_text("utf-8") for log in logs)
    completing = (module_slurm.folder / f"distlm-datastore-{jobs['datastore']}_0.log").read_text("utf-8")
    assert " 0 shards to write" in completing


def test_an_array_that_does_not_count_from_0_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.sbatch("--array=1-2", *FLAGS, script("datastore-array"), *recipe(tmp_path / "run", tmp_path))
    assert slurm.wait(job) == "FAILED"
    assert "submit with --array=0-1" in slurm.output(job)
    assert not (tmp_path / "run" / "datastore").exists()


def test_fine_tuning_is_a_stage_of_the_masked_language_model(runs: dict[str, tuple[Path, dict[str, str]]]) -> None:
    """On two ranks, with the rows and the order of one; its scores are in the report, written after them."""
    plain, other = (
        json.loads((runs[run][0] / "finetune" / "SST-2" / "results.json").read_text("utf-8"))["seeds"]["1"]
        for run in ("plain-masked", "masked")
    )
    assert (plain["ranks"], other["ranks"]) == (1, 2)
    assert plain["data_fingerprint"] == other["data_fingerprint"] and plain["updates"] == other["updates"] == 4
    assert "Fine-tuning" in (runs["masked"][0] / "report.html").read_text("utf-8")
