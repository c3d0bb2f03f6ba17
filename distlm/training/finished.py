"""What the pipeline and the launchers ask of a run directory: is this stage done? Without torch."""

from typing import Any

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.models.card import model_fingerprint
from distlm.runtime.files import read_json
from distlm.runtime.rundir import RunDir

STATE, RESULT = "state.json", "lm.json"


def trained(config: RunConfig, run: RunDir) -> bool:
    """Whether the training of `config` is finished in this run directory."""
    complete = run.complete_checkpoints()
    if config.model.kind != "awd_lstm":
        return run.checkpoint(config.train.updates) in complete
    try:
        return bool(complete) and bool(read_json(complete[-1] / STATE, "state of a checkpoint").get("finished"))
    except DistlmError:
        return False


def evaluated_as_trained(config: RunConfig, run: RunDir) -> bool:
    """Whether lm.json holds every split of knn.splits under the present best checkpoint."""
    path = run.root / RESULT
    if not path.exists():
        return False
    results = read_json(path, "evaluation results")
    fingerprint = model_fingerprint(run.model_checkpoint(config))
    return results["model"]["fingerprint"] == fingerprint and set(config.knn.splits) <= set(results["splits"])


def lm_table(results: dict[str, Any]) -> str:
    """lm.json for people."""
    lines = [f"{'split':<8}{'tokens':>10}{'loss':>10}{'perplexity':>12}"]
    for split, found in results["splits"].items():
        lines.append(f"{split:<8}{found['tokens']:>10}{found['loss_nats']:>10.4f}{found['perplexity']:>12.2f}")
    return "\n".join([*lines, f"context: {results['context_rule']}"])
