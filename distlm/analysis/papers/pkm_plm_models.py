"""Which runs of `distlm reproduce pkm-plm` are which models of Kim & Jung (2020)."""

from pathlib import Path

from distlm.analysis.papers.seeds import finished_runs, model_and_seed
from distlm.training.records import LmResults

MODELS = {
    "dense": "dense", "init": "+Init (dense, as long again)", "pkm": "+PKM", "resm": "+ResM", "init-pkm": "+Init +PKM",
    "init-resm": "+Init +ResM", "init-resm-fresh": "+Init +ResM′",
}  # fmt: skip
"""Run → what Kim & Jung call it."""
TOP1_MU = {"pkm": (2.2, 84.1), "resm": (75.0, 81.0), "init-pkm": (97.4, 95.7), "init-resm": (98.2, 97.3)}
"""Model → their top-1 MU in % of layers 4 and 8 (table 2)."""


def words_of(run: str) -> str:
    """What the paper calls the model of a run, and the seed where it is one of several."""
    model, seed = model_and_seed(run)
    return MODELS[model] + (f", seed {seed}" if seed else "")


def finished(root: Path) -> dict[str, LmResults]:
    """Every finished run, model by model, of each seed."""
    return {run: found for model in MODELS for run, found in finished_runs(root, model).items()}
