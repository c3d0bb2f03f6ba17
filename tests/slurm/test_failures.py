"""A rank or a node that dies on a real Slurm: noticed, named, and continued to the same bytes.

The tests print how long it took until another rank said which one was lost. That is launch.lost_after_s (60 by default,
3 here) and a little for a node, and a second or two for a rank whose node lives. All runs are in the queue at once.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.deadline import until
from support.slurm import ON_TWO, REQUEUED, logged, long_training, rank_process, script
from support.slurm.cluster import Slurm
from support.train import same_end, tiny_tokens

WHERE = {
    "undisturbed": "node[2-3]",
    "killed rank": "node[2-3]",
    # the node of the batch script, which dies with it: Slurm requeues the job
    "first node": "node[1-2]",
    # the script lives; who is first requeues: Slurm that misses the node, or the script that sees its step end
    "second node": "node[3-4]",
}


@dataclass
class Loss:
    """What happened to one run."""

    job: str
    run: Path
    rank: int
    node: str = ""
    since: float = 0.0
    noticed_s: float = 0.0


def strike(slurm: Slurm, name: str, loss: Loss) -> None:
    """Kill the rank, or crash its node."""
    loss.node, pid = rank_process(loss.run, loss.rank)
    loss.since = time.monotonic()
    if name == "killed rank":
        slurm.on(loss.node, "kill", "-KILL", pid)
    else:
        slurm.crash(loss.node)


@pytest.fixture(scope="module")
def losses(module_slurm: Slurm) -> dict[str, Loss]:
    """Every run struck after 5 updates, its loss named by another rank, and then done; `undisturbed` only done."""
    slurm = module_slurm
    tokens = tiny_tokens(slurm.folder)
    losses = {}
    for name, nodes in WHERE.items():
        run = slurm.folder / name.replace(" ", "-")
        job = slurm.sbatch(*ON_TWO, f"--nodelist={nodes}", script("train"), *long_training(run, tokens))
        losses[name] = Loss(job, run, rank=0 if name == "first node" else 1)
    waiting = {name for name in WHERE if name != "undisturbed"}

    def all_noticed() -> bool:
        for name in sorted(waiting):
            loss = losses[name]
            if not loss.node and len(logged(loss.run)) >= 5:
                strike(slurm, name, loss)
            elif loss.node and f"rank {loss.rank} on {loss.node} is lost" in slurm.output(loss.job):
                loss.noticed_s = time.monotonic() - loss.since
                waiting.remove(name)
        return not waiting

    until(all_noticed, lambda: f"{waiting} to be struck and noticed: {losses}", pause=0.02)
    until(
        lambda: all(slurm.restarts(loss.job) for name, loss in losses.items() if name != "undisturbed"),
        lambda: "requeues\n" + "\n".join(slurm.output(loss.job) for loss in losses.values()),
        pause=0.1,
    )
    for name in ("first node", "second node"):
        slurm.start(losses[name].node)
    for loss in losses.values():
        slurm.done(loss.job)
    return losses


@pytest.mark.parametrize("name", [name for name in WHERE if name != "undisturbed"])
def test_named_and_continued_in_the_same_bytes(module_slurm: Slurm, losses: dict[str, Loss], name: str) -> None:
    loss, whole = losses[name], losses["undisturbed"].run
    print(f"{name}: rank {loss.rank} on {loss.node} named as lost after {loss.noticed_s:.1f} s")
    assert same_end(whole, loss.run)
    assert logged(whole) == logged(loss.run)
    assert logged(whole, "train/data_fingerprint") == logged(loss.run, "train/data_fingerprint")
    if name == "killed rank":
        assert REQUEUED in module_slurm.output(loss.job)
