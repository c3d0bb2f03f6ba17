"""Two ResM layers of 262,144 slots on BERT-base, beside the dense model: what `distlm memory bench` times."""

from distlm.config import load_config
from distlm.models.plm.config import PlmRun
from distlm.models.plm.measure.bench import run_bench
from distlm.runtime.ranks.device import default_device
from gpu.checks.machine import has_bf16
from gpu.part import Outcome, Place

GOAL = 1.3
TURNS, TOKENS, TRAIN_ROWS = 20, 512, 8
"""Rows of BERT's full length; a step of 4,096 tokens keeps a GPU busy, and both models fit into 16 GB."""
QUICK = [
    "shards.vocabulary_size=60", "plm.layers=2", "plm.width=12", "plm.heads=3", "plm.ffn_width=24",
    "plm.max_positions=16", "memory.positions=[1]", "memory.sub_keys=4", "memory.k=2", "memory.key_width=8",
]  # fmt: skip


def run(place: Place) -> Outcome:
    """In the half precision of the device."""
    sizes, settings = ((8, 2, 2), QUICK) if place.quick else ((TOKENS, TURNS, TRAIN_ROWS), [])
    config = load_config("plm-base-resm", ["shards.folder=unread", *settings])
    assert isinstance(config, PlmRun)
    precision = "bf16" if has_bf16() else "fp16"
    dense, resm = run_bench(config, *sizes, default_device(), precision, ("base +ResM",))
    out = Outcome({"precision": precision, "numbers": resm.parameters})
    out.figures |= {
        "dense ms, a row": round(1000 * dense.inference_s, 3),
        "ResM ms, a row": round(1000 * resm.inference_s, 3),
    }
    out.goal("inference over dense", resm.inference_ratio, most=GOAL)
    if dense.training_s is not None and resm.training_s is not None and resm.training_ratio is not None:
        out.figures |= {
            "dense ms, a step": round(1000 * dense.training_s, 2),
            "ResM ms, a step": round(1000 * resm.training_s, 2),
        }
        out.goal("training over dense", resm.training_ratio, most=GOAL)
    return out
