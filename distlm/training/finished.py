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
    """Whether lm.json holds every split that is asked for, under the present checkpoint: the best one, or of a masked
    language model the newest."""
    path, masked = run.root / RESULT, config.model.kind == "plm"
    if not path.exists():
        return False
    results = read_json(path, "evaluation results")
    checkpoint = run.newest_checkpoint() if masked else run.model_checkpoint(config)
    wanted = {*config.shards.splits} - {"train"} if masked else set(config.knn.splits)
    wanted |= {word.partition("=")[0] for word in config.plm.texts} if masked else set()
    return results["model"]["fingerprint"] == model_fingerprint(checkpoint) and wanted <= set(results["splits"])


def lm_table(results: dict[str, Any]) -> str:
    """lm.json for people."""
    lines = [f"{'split':<8}{'tokens':>10}{'loss':>10}{'perplexity':>12}"]
    for split, found in results["splits"].items():
        lines.append(f"{split:<8}{found['tokens']:>10}{found['loss_nats']:>10.4f}{found['perplexity']:>12.2f}")
        for layer, use in found.get("memory", {}).items():
            shares = f"MU {100 * use['mu']:.1f} %, top-1 MU {100 * use['top1_mu']:.1f} %"
            lines.append(f"  memory of layer {layer}: {shares}, KL_u {use['kl_u']:.2f}, KL_w {use['kl_w']:.2f}")
    return "\n".join([*lines, f"context: {results['context_rule']}"])
