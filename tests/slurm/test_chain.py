"""What becomes of the jobs that wait for one that failed or was preempted by cancelling, on a real Slurm.

The runs are in the queue at once. `failed`: its first job fails for a reason outside of it. The others are preempted in
a partition whose PreemptMode is CANCEL: `dead` for good, `comes back` (`again: 1`) under its id, and `successor`, which
Slurm does not requeue.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.slurm import logged, repeated
from support.slurm.cluster import Slurm
from support.slurm.submitted import jobs_of, recorded, said, submit, tool
from support.train import same_end, tiny_tokens

STAGES = "train,datastore"
LOW = "partition: low\n"
PREEMPTED = {"dead": LOW, "comes back": LOW + "again: 1\n", "successor": LOW + "again: 1\n"}


@dataclass
class Chain:
    """One run: its first jobs and what was seen of them."""

    run: Path
    first: dict[str, str]
    seen: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def chains(module_slurm: Slurm) -> dict[str, Chain]:
    """Every chain after its accident; `failed` and `dead` requeued by the command; the last jobs of all have ended."""
    slurm, tokens, flag = module_slurm, tiny_tokens(module_slurm.folder), module_slurm.folder / "flag"
    gate = slurm.sbatch("-N1", "--hold", "--wrap", "true")
    failing = f"setup: ['[ -e {flag} ] || exit 1']\ngpu_type: v100\nstages: {{train: {{gpus_per_node: 1}}}}\n"
    run = slurm.folder / "failed"
    chains = {"failed": Chain(run, submit(slurm, run, tokens, STAGES, f"--after=afterany:{gate}", site=failing))}
    for name, site in PREEMPTED.items():
        run = slurm.folder / name.replace(" ", "-")
        stages = "train" if name == "comes back" else STAGES
        # Behind the gate they begin at once, and none is done while another is submitted.
        words = (f"--after=afterany:{gate}", "train.updates=400")
        chains[name] = Chain(run, submit(slurm, run, tokens, stages, *words, site=site))
    failed, successor = chains["failed"], chains["successor"]
    shown = slurm.show(failed.first["train"])
    failed.seen = {name: shown[name] for name in ("Dependency", "TresPerNode", "JobState")}
    slurm.run("scontrol", "release", gate)
    slurm.run("scontrol", "update", f"jobid={successor.first['train']}", "requeue=0")
    for name in PREEMPTED:
        chain = chains[name]
        slurm.until_in(chain.first["train"], lambda run=chain.run: len(logged(run)) >= 3, "3 updates")  # type: ignore[misc]
    urgent = slurm.sbatch("-p", "urgent", "-N4", "--exclusive", "--wrap", "sleep 2")
    for name in ("failed", "dead"):
        chain = chains[name]
        chain.seen["train"] = slurm.wait(chain.first["train"])
        chain.seen["datastore"] = slurm.wait(chain.first["datastore"])
        chain.seen["status"] = tool(slurm, "status", chain.run).stdout
        flag.touch()
        chain.seen["requeue"] = tool(slurm, "requeue", chain.run).stdout
    slurm.done(urgent)
    for chain in chains.values():
        slurm.jobs += jobs_of(chain.run).values()
        for job in jobs_of(chain.run).values():
            slurm.done(job)
    return chains


def test_a_failed_job_takes_what_waits_for_it_back_with_it(chains: dict[str, Chain]) -> None:
    chain = chains["failed"]
    train, datastore = chain.first["train"], chain.first["datastore"]
    assert (chain.seen["train"], chain.seen["datastore"]) == ("FAILED", "CANCELLED")
    now = jobs_of(chain.run)
    assert now["train"] == train and now["datastore"] != datastore
    assert f"job {train} (train): requeued, was FAILED" in chain.seen["requeue"]
    assert (
        f"job {datastore} (datastore): submitted again as job {now['datastore']}, after {train}"
        in chain.seen["requeue"]
    )
    newest = recorded(chain.run)[-1]
    assert (newest["job"], newest["after"]) == (now["datastore"], [train])


def test_the_first_job_waits_beside_the_chain_and_its_gpus_have_a_type(chains: dict[str, Chain]) -> None:
    seen = chains["failed"].seen
    assert seen["JobState"] == "PENDING" and seen["Dependency"].startswith("afterany:")
    assert seen["TresPerNode"] == "gres:gpu:v100:1"


def test_a_preempted_job_is_named_with_the_command_that_brings_its_chain_back(chains: dict[str, Chain]) -> None:
    chain = chains["dead"]
    train = chain.first["train"]
    assert (chain.seen["train"], chain.seen["datastore"]) == ("PREEMPTED", "CANCELLED")
    assert (
        f"job {train} (train): Slurm ended it for another job; it does not come back by itself" in chain.seen["status"]
    )
    assert f"distlm requeue {chain.run}" in chain.seen["status"]
    assert jobs_of(chain.run)["datastore"] != chain.first["datastore"]


def test_again_brings_a_preempted_job_back_under_its_id(module_slurm: Slurm, chains: dict[str, Chain]) -> None:
    chain = chains["comes back"]
    assert jobs_of(chain.run) == chain.first
    assert module_slurm.restarts(chain.first["train"]) == 1
    assert "requeued by this task" in said(module_slurm, chain.run, chain.first["train"])


def test_again_submits_a_successor_where_slurm_requeues_nothing(module_slurm: Slurm, chains: dict[str, Chain]) -> None:
    chain = chains["successor"]
    now = jobs_of(chain.run)
    assert now["train"] != chain.first["train"] and now["datastore"] == chain.first["datastore"]
    assert f"job {now['train']} continues where it stopped" in said(module_slurm, chain.run, chain.first["train"])
    assert [line["job"] for line in recorded(chain.run) if line.get("follows") == chain.first["train"]] == [
        now["train"]
    ]
    assert module_slurm.states(chain.first["train"]) == ["PREEMPTED"]
    assert recorded(chain.run)[-1]["after"] == [now["train"]]


def test_all_of_them_end_in_the_same_bytes(chains: dict[str, Chain]) -> None:
    whole = chains["dead"].run
    for name in ("comes back", "successor"):
        assert same_end(whole, chains[name].run) and logged(whole) == logged(chains[name].run)
        assert not repeated(chains[name].run)
