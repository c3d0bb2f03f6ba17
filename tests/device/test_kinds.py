"""Every kind of model but distlm's own transformer and LSTM (test_stages.py) on a device, beside the same on the
processor: training that stops once, evaluation, the stages of a kNN-LM, fine-tuning. Dropout is off.

All of a place is done in one process, which would else spend most of the time on its imports.
"""

import json
from pathlib import Path

import pytest
from support import mpirun, write_text
from support.drivers import stages as driver
from support.finetune import hugging_face, pretrained, write_sst2
from support.finetune import settings as finetune_settings
from support.foreign.hf import save_gpt2, save_llama
from support.plm import plm_settings, tiny_shards
from support.sim.devices import NEEDS_DEVICE, ON_PROCESSOR
from support.train import curve, relative

pytestmark = NEEDS_DEVICE
Job = tuple[str, str, list[str]]
# A query between two slots may read the other one.
DENSE, OF_MEMORY = 1e-5, 1e-4

CAUSAL = {"gpt2": (save_gpt2, "transformer.h.1.mlp:input"), "llama": (save_llama, "model.layers.1.mlp:input")}
OF_CAUSAL = [
    "train.tokens_per_sample=64", "train.blocks_per_update=4", "train.micro_blocks=2", "train.updates=4",
    "train.lr=0.003", "train.warmup_updates=1", "train.valid_every=2", "train.log_every=1", "train.precision=fp32",
    "datastore.context_window=32", "datastore.block=32", "index.factory=IVF4,PQ4", "index.sample=2048",
    "knn.context_window=32", "knn.block=32", "knn.k=16", "knn.ks=[4,16]", "knn.nprobe=4", "knn.distances=exact",
    "knn.gate=true", "cache.windows=[50]", "cache.thetas=[0.1]", "launch.threads=1",
]  # fmt: skip
STAGES = [
    "data prepare", "train", "evaluate", "datastore write", "index build", "knn search", "knn cache", "knn tune",
    "knn evaluate", "generate",
]  # fmt: skip
MEMORY = ["memory.positions=[1]", "memory.sub_keys=8", "memory.heads=2", "memory.k=4", "memory.key_width=8"]
MASKED = {
    "bert": ["plm.backbone=bert", "memory.kind=pkm", "memory.moments=bf16"],
    "distilbert": ["plm.backbone=distilbert", "memory.kind=resm", "memory.optimizer=adam"],
    "roberta": ["plm.backbone=roberta", "memory.kind=resm", "memory.stale=catch_up"],
}
OF_MASKED = ["train.updates=4", "train.lr=0.003", "plm.dropout=0", "plm.attention_dropout=0", "memory.value_dropout=0",
             "memory.query_dropout=0"]  # fmt: skip
FINE = {"encoder": [], "updated": ["finetune.memory=updated"], "frozen": ["finetune.memory=frozen"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PLACE/RUN of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    text, shards, glue = (
        write_text(folder / "hf-text", train_lines=60),
        tiny_shards(folder),
        write_sst2(folder / "glue"),
    )
    for name, (save, _) in CAUSAL.items():
        _without_dropout(save(folder / name, text))
    encoder, memory = hugging_face(folder / "encoder", initializer_range=0.2), pretrained(folder / "pretrained", "resm")
    for place, environment in (("processor", ON_PROCESSOR), ("device", {})):
        there = folder / place
        jobs: list[Job] = []
        for name, (_, tap) in CAUSAL.items():
            model = [f"hf.name={folder / name}", f"data.tokenizer={folder / name}", f"data.text_dir={text}"]
            given = [*model, f"run_dir={there / name}", f"train.tap={tap}", f"datastore.tap={tap}", *OF_CAUSAL]
            jobs += _stopped_once("hf", given, STAGES)
            jobs += [("hf", words, [*given, f"run_dir={there / name}-memory", "memory.kind=resm", *MEMORY])
                     for words in ("data prepare", "train", "evaluate")]  # fmt: skip
        for name, more in MASKED.items():
            given = plm_settings(shards, there / name, *more, *OF_MASKED)
            jobs += _stopped_once("plm-base", given, ["train", "evaluate"])
        for name, more in FINE.items():
            source = encoder if name == "encoder" else memory
            more = [*more, f"finetune.checkpoint={source}", "finetune.dropout=0", "finetune.epochs=1"]
            jobs.append(("plm-base", "finetune", finetune_settings(there / name, glue, *more)))
        listing = folder / f"{place}.json"
        listing.write_text(json.dumps(jobs), "utf-8")
        mpirun(1, [driver.__file__, str(listing)], **environment)
    return folder


def _without_dropout(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(
        json.dumps(config | {name: 0.0 for name in config if name.endswith(("_pdrop", "_dropout"))}), "utf-8"
    )


def _stopped_once(recipe: str, given: list[str], stages: list[str]) -> list[Job]:
    jobs = []
    for words in stages:
        if words == "train":
            jobs.append((recipe, words, [*given, "train.max_updates_this_run=2"]))
        jobs.append((recipe, words, given))
    return jobs


@pytest.mark.parametrize("name", [*CAUSAL, *(f"{name}-memory" for name in CAUSAL), *MASKED])
def test_training_and_evaluation(runs: Path, name: str) -> None:
    there, here = runs / "processor" / name, runs / "device" / name
    tolerance = DENSE if name in CAUSAL else OF_MEMORY
    assert max(curve(here)) == 4
    for curves in ("train/loss", "valid/loss"):
        assert relative(curve(there, curves), curve(here, curves)) < tolerance
    assert curve(there, "train/data_fingerprint") == curve(here, "train/data_fingerprint")
    same_figures(there / "lm.json", here / "lm.json", tolerance, ("loss", "perplexity", "nats"))


# Not of GPT-2: on so few tokens the λ of a bucket follows the last bits of its distances.
@pytest.mark.parametrize("name", ["llama"])
def test_stages_of_a_knn_lm(runs: Path, name: str) -> None:
    """Exact re-scoring, cache, tuning with a gate, evaluation; a text continued greedily is the same text."""
    there, here = runs / "processor" / name, runs / "device" / name
    same_figures(there / "results.json", here / "results.json", 1e-4, ("perplexity",))
    texts = [(run / "generated.txt").read_text("utf-8").splitlines()[:3] for run in (there, here)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", FINE)
def test_fine_tuning(runs: Path, name: str) -> None:
    (there,), (here,) = ([*(runs / place / name / "finetune").glob("*")] for place in ("processor", "device"))
    same_figures(there / "results.json", here / "results.json", 1e-3, ("accuracy", "loss"))
    losses = [curve(folder / "seed-1", "train/loss") for folder in (there, here)]
    assert relative(*losses) < 1e-3


def same_figures(one: Path, other: Path, tolerance: float, names: tuple[str, ...]) -> None:
    """Numbers under the same keys, of those that have one of `names` in their path."""
    found = [_figures(json.loads(path.read_text("utf-8"))) for path in (one, other)]
    first, second = ({key: value for key, value in each.items() if any(n in key for n in names)} for each in found)
    assert first.keys() == second.keys() and first
    for key, value in first.items():
        assert second[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


def _figures(found: object, name: str = "") -> dict[str, float]:
    if isinstance(found, dict):
        return {k: v for key, value in found.items() for k, v in _figures(value, f"{name}/{key}").items()}
    return {name: found} if isinstance(found, float) else {}
