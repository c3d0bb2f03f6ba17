"""What the pipeline and the launchers ask of a run directory: is this stage done? Without torch."""

from distlm.config.schema import RunConfig
from distlm.models.card import model_fingerprint
from distlm.models.registry import kind
from distlm.runtime.rundir import RunDir
from distlm.training.records import LmResults

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
    results = LmResults.read(path)
    # With a memory the fingerprint is of its values, too.
    same = results.model.fingerprint == model_fingerprint(run.model_checkpoint(config))
    return same and set(config.knn.splits) <= set(results.splits)


def lm_table(results: LmResults) -> str:
    """lm.json for people."""
    lines = [f"{'split':<8}{'tokens':>10}{'loss':>10}{'perplexity':>12}"]
    for split, found in results.splits.items():
        lines.append(f"{split:<8}{found.tokens:>10}{found.loss_nats:>10.4f}{found.perplexity:>12.2f}")
        lines += [f"  memory of layer {layer}: {use.words}" for layer, use in (found.memory or {}).items()]
    return "\n".join([*lines, f"context: {results.context_rule}"])
