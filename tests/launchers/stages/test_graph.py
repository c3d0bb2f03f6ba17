"""The stages of a recipe as jobs: order, dependencies, shapes, arrays, what is finished, and what cannot work."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.deadline import DEADLINE_S
from support.manifest import write_complete_manifest

from distlm.config.load import load_config
from distlm.errors import DistlmError, UsageError
from distlm.pipeline import STEPS
from distlm.runtime.files import write_json
from distlm.runtime.rundir import RunDir
from distlm.verbs import STAGE_VERBS
from launchers.guard import MARKS
from launchers.site import STAGES, Site, StageSettings
from launchers.stages.graph import SPECS, Wish, build_graph, choose_stages, pending_stages

CPU = Site(gpus_per_node=0, tasks_per_node=2)


def config(run="nowhere", *overrides):
    return load_config("demo", [f"run_dir={run}", "train.micro_blocks=1", *overrides])


def shape(job):
    return job.name, job.resources.nodes, job.resources.tasks_per_node, job.resources.gpus_per_node, job.after


def test_every_stage_has_its_verbs_and_its_progress_mark():
    assert tuple(SPECS) == STAGES == tuple(MARKS)
    used = [verb for spec in SPECS.values() for verb in (*spec.verbs, *spec.optional)]
    assert set(used) - {"report"} <= {verb.words for verb in STAGE_VERBS}
    # The same work as `distlm run`, whose index is built in one go.
    steps = [verb for verb in used if not verb.startswith("index") and verb != "report"]
    assert sorted(steps) == sorted(words for words in STEPS if words != "index build")


def test_what_the_configuration_does_not_ask_for_is_left_out():
    assert [stage for stage in STAGES if SPECS[stage].verbs_of(config()) != SPECS[stage].verbs] == [
        "shard", "finetune"
    ]  # fmt: skip
    (search,) = build_graph(config("nowhere", "cache.use=true"), CPU, ["search"])
    assert search.verbs == ("knn search", "knn cache")
    lstm = load_config("awd-lstm-small", ["run_dir=nowhere"])
    assert pending_stages(lstm) == ("prepare", "train", "evaluate")
    assert SPECS["evaluate"].verbs_of(lstm) == ("evaluate", "report")
    assert pending_stages(load_config("plm-base", ["run_dir=nowhere"])) == ("shard", "train", "evaluate")


def test_shards_are_written_by_cpus():
    plm = load_config("plm-base", ["run_dir=nowhere", "train.blocks_per_update=16", "train.micro_blocks=8"])
    shard, train, evaluate = build_graph(plm, Site(), STAGES, Wish(nodes=2))
    assert shape(shard) == ("shard", 2, 4, 0, ()) and shard.verbs == ("data shard",)
    assert shape(train) == ("train", 2, 4, 4, ("shard",)) and evaluate.after == ("train",)
    with pytest.raises(DistlmError, match="a masked language model's micro-batch is of all ranks"):
        build_graph(plm, Site(), STAGES, Wish(nodes=4))


def test_tasks_are_fine_tuned_on_after_the_evaluation(tmp_path):
    words = [f"run_dir={tmp_path}", "train.blocks_per_update=16", "train.micro_blocks=8", "finetune.tasks=[RTE,SST-2]"]
    tuned = load_config("plm-base", [*words, "finetune.rows_per_update=24"])
    assert pending_stages(tuned) == ("shard", "train", "evaluate", "finetune")
    last = build_graph(tuned, Site(), STAGES, Wish(nodes=2))[-1]
    assert shape(last) == ("finetune", 2, 4, 4, ("evaluate",)) and last.verbs == ("finetune", "report")
    assert MARKS["finetune"](tuned, RunDir.of(tuned)) == "0 seeds, no checkpoint"
    seed = tmp_path / "finetune" / "RTE" / "seed-1"
    write_json(seed / "checkpoints" / "step-00000012" / "complete.json", {})
    assert MARKS["finetune"](tuned, RunDir.of(tuned)) == "0 seeds, step-00000012"
    with pytest.raises(DistlmError, match=r"finetune\.micro_rows=20: .*and 8 ranks do not divide it"):
        build_graph(load_config("plm-base", [*words, "finetune.rows_per_update=20"]), Site(), STAGES, Wish(nodes=2))


def test_each_job_waits_for_the_one_before_it():
    assert [shape(job) for job in build_graph(config(), Site(), STAGES, Wish(nodes=2))] == [
        ("prepare", 1, 1, 0, ()),
        ("train", 2, 4, 4, ("prepare",)),
        ("datastore", 2, 4, 4, ("train",)),
        ("index-train", 2, 4, 4, ("datastore",)),
        ("index-add", 2, 4, 4, ("index-train",)),
        ("index-merge", 1, 4, 0, ("index-add",)),
        ("search", 2, 4, 4, ("index-merge",)),
        ("evaluate", 1, 1, 0, ("search",)),
    ]


def test_a_stage_books_no_more_nodes_than_it_has_work_for():
    """What one rank does, or one node as fast as many, takes one node of however many are asked for."""
    shapes = {job.name: shape(job)[1:4] for job in build_graph(config(), Site(), STAGES, Wish(nodes=2, ranks=8))}
    one = {name for name, (nodes, _, _) in shapes.items() if nodes == 1}
    assert one == {"prepare", "index-merge", "evaluate"}
    assert shapes["index-train"] == (2, 4, 4) and shapes["index-merge"] == (1, 4, 0)
    assert build_graph(config(), Site(), ["index-merge"], Wish(ranks=2))[0].ranks == 2
    # Who wants more says so of that stage.
    site = Site(stages={"index-merge": StageSettings(nodes=3)})
    assert shape(build_graph(config(), site, ["index-merge"], Wish(nodes=2))[0])[1:4] == (3, 4, 0)


def test_an_array_is_shares_and_the_job_that_completes_the_stage():
    site = Site(stages={"datastore": StageSettings(array=3)})
    jobs = {job.name: job for job in build_graph(config(), site, STAGES[2:7])}
    assert list(jobs) == ["train", "datastore-shares", "datastore", "index-train", "index-add", "index-merge"]
    assert shape(jobs["datastore-shares"]) == ("datastore-shares", 1, 1, 1, ("train",))
    assert jobs["datastore-shares"].shares == 3 and jobs["datastore"].shares == 0
    assert shape(jobs["datastore"]) == ("datastore", 1, 1, 1, ("datastore-shares",))
    everywhere = build_graph(config(), CPU, STAGES, Wish(array=2))
    assert [job.name for job in everywhere if job.shares] == ["datastore-shares", "index-add-shares"]


@pytest.mark.parametrize(
    ("wish", "nodes", "tasks", "gpus"),
    [
        (Wish(), 1, 4, 4),
        (Wish(ranks=8), 2, 4, 4),
        (Wish(ranks=2), 1, 2, 2),  # GPUs without a rank are not asked for
        (Wish(ranks=6), 2, 3, 3),
        (Wish(ranks=4, nodes=4), 4, 1, 1),
        (Wish(nodes=3), 3, 4, 4),
    ],
)
def test_ranks_are_placed_on_nodes(wish, nodes, tasks, gpus):
    assert shape(build_graph(config(), Site(), ["search"], wish)[0])[1:4] == (nodes, tasks, gpus)


def test_what_cannot_work_is_refused():
    with pytest.raises(
        UsageError, match=r"stage search: 5 ranks do not divide over 2 nodes; use --ranks 4 or --ranks 6"
    ):
        build_graph(config(), Site(), ["search"], Wish(nodes=2, ranks=5))
    with pytest.raises(UsageError, match=r"8 ranks on a node of 4 GPUs.*at most --ranks 4"):
        build_graph(config(), Site(), ["search"], Wish(nodes=1, ranks=8))
    with pytest.raises(DistlmError, match=r"do not divide over 3 ranks; set train\.blocks_per_update="):
        build_graph(config(), CPU, ["train"], Wish(nodes=1, ranks=3))
    with pytest.raises(
        UsageError, match=r"--array 4: none of these stages can be an array \(datastore, index-add can\)"
    ):
        choose_stages("search", 4)
    # Finished stages may be among them: the same command must go on where it was.
    assert build_graph(config(), CPU, ["search"], Wish(array=4))[0].shares == 0
    with pytest.raises(UsageError, match=r"time limit of 2 min, and the ranks are told 120 s before it"):
        build_graph(config(), Site(), ["search"], Wish(time=2))
    with pytest.raises(UsageError, match=r"stages\.search\.array=2: this stage has no shares"):
        build_graph(config(), Site(stages={"search": StageSettings(array=2)}), ["search"])


def test_stages_are_chosen_by_name_and_range():
    assert choose_stages("") == STAGES
    assert choose_stages("datastore,train") == ("train", "datastore")
    assert choose_stages("index-train..index-merge,prepare") == ("prepare", "index-train", "index-add", "index-merge")
    assert choose_stages("..train") == ("prepare", "shard", "train")
    assert choose_stages("search..") == ("search", "evaluate", "finetune")
    with pytest.raises(UsageError, match=r"--stages: unknown stage 'serach'; did you mean 'search'\?"):
        choose_stages("train,serach")


def test_finished_stages_are_left_out(tmp_path):
    index = RunDir.of(config(tmp_path)).index
    chosen = ("datastore", "index-train", "index-add", "index-merge")
    assert pending_stages(config(tmp_path), chosen) == chosen
    write_complete_manifest(tmp_path / "datastore", shards=2)
    write_json(index / "template.json", {})
    write_json(index / "parts" / "part-00000.json", {})
    assert pending_stages(config(tmp_path), chosen) == ("index-add", "index-merge")
    write_json(index / "parts" / "part-00001.json", {})
    assert pending_stages(config(tmp_path), chosen) == ("index-merge",)
    write_json(index / "index.json", {})
    # keep_parts=false removes the parts of a merged index.
    (index / "parts" / "part-00001.json").unlink()
    assert pending_stages(config(tmp_path), chosen) == ()


def test_a_task_imports_no_torch():
    """Before submitit has its signal handlers a signal is lost, so what a task needs until then must be quick."""
    code = "import sys, launchers.task, launchers.guard; sys.exit('torch' in sys.modules or 'faiss' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], timeout=DEADLINE_S).returncode == 0
    )
