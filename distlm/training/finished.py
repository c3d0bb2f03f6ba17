"""What the pipeline and the launchers ask of a run directory: is this stage done? Without torch."""

from typing import Any

from distlm.config.schema import RunConfig
from distlm.models.card import model_fingerprint
from distlm.models.registry import kind
from distlm.runtime.files import read_json
from distlm.runtime.rundir import RunDir

STATE, RESULT = "state.json", "lm.json"


def trained(config: RunConfig, run: RunDir) -> bool:
    """Whether the training of `config` is finished in this run directory."""
    return kind(config.model.kind).finished(config, run)


def evaluated(config: RunConfig, run: RunDir) -> bool:
    """Whether lm.json holds every text that is asked for, under the present checkpoint."""
    return kind(config.model.kind).evaluated(config, run)


def evaluated_as_trained(config: RunConfig, run: RunDir) -> bool:
    """The same, for the splits of a model that predicts the next word and its best checkpoint."""
    path = run.root / RESULT
    if not path.exists():
        return False
    results = read_json(path, "evaluation results")
    same = results["model"]["fingerprint"] == model_fingerprint(run.model_checkpoint(config))
    return same and set(config.knn.splits) <= set(results["splits"])


def lm_table(results: dict[str, Any]) -> str:
    """lm.json for people."""
    lines = [f"{'split':<8}{'tokens':>10}{'loss':>10}{'perplexity':>12}"]
    for split, found in results["splits"].items():
        lines.append(f"{split:<8}{found['tokens']:>10}{found['loss_nats']:>10.4f}{found['perplexity']:>12.2f}")
        for layer, use in found.get("memory", {}).items():
            shares = f"MU {100 * use['mu']:.1f} %, top-1 MU {100 * use['top1_mu']:.1f} %"
            lines.append(f"  memory of layer {layer}: {shares}, KL_u {use['kl_u']:.2f}, KL_w {use['kl_w']:.2f}")
    return "\n".join([*lines, f"context: {results['context_rule']}"])
