"""What the pipeline and the launchers ask of a run directory: is this stage done? Without torch."""

from pathlib import Path
from typing import Any

from distlm.config.schema import RunConfig
from distlm.data.shards.reader import ShardRows
from distlm.errors import DistlmError
from distlm.models.card import model_fingerprint
from distlm.models.complete import marked_hashes
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
    path = run.root / RESULT
    if not path.exists():
        return False
    results = read_json(path, "evaluation results")
    if config.model.kind == "plm":
        return _masked_as_trained(config, run, results)
    same = results["model"]["fingerprint"] == model_fingerprint(run.model_checkpoint(config))
    return same and set(config.knn.splits) <= set(results["splits"])


def _masked_as_trained(config: RunConfig, run: RunDir, results: dict[str, Any]) -> bool:
    """Whether lm.json is of these weights and values, masks and rows. One that does not say so, written by an older
    version, is of others."""
    try:
        texts = open_texts(config, run)
    except DistlmError:
        # What is wrong with them is for the evaluation to say.
        return False
    model, checkpoint = results["model"], run.newest_checkpoint()
    there = [model["fingerprint"], model.get("memory_files"), results.get("mask_seed"), results.get("mask_share")]
    now = [model_fingerprint(checkpoint), memory_files(checkpoint), config.train.seed, config.plm.mask_share]
    rows = {name: found.get("rows_fingerprint") for name, found in results["splits"].items()}
    return there == now and all(rows.get(name) == found.fingerprint for name, found in texts.items())


def memory_files(checkpoint: Path) -> dict[str, str]:
    """File → hash of the memories' values in a checkpoint, which the fingerprint of the model leaves out."""
    return marked_hashes(checkpoint, "memory-")


def open_texts(config: RunConfig, run: RunDir) -> dict[str, ShardRows]:
    """Name → rows that a masked language model is evaluated on: valid and test of its shards, and those of plm.texts.

    Raises DistlmError for shards that are missing or damaged, and for plm.texts that are no NAME=FOLDER.
    """
    folder = run.shards(config)
    texts: dict[str, ShardRows] = {}
    for split in ("valid", "test"):
        if split in config.shards.splits:
            texts[split] = ShardRows.open(folder, split)
    for word in config.plm.texts:
        name, equals, path = word.partition("=")
        if not equals or name in texts:
            raise DistlmError(f"plm.texts: {word!r}: give each as NAME=FOLDER of shards, every name once")
        texts[name] = ShardRows.open(Path(path), "test")
    return texts


def lm_table(results: dict[str, Any]) -> str:
    """lm.json for people."""
    lines = [f"{'split':<8}{'tokens':>10}{'loss':>10}{'perplexity':>12}"]
    for split, found in results["splits"].items():
        lines.append(f"{split:<8}{found['tokens']:>10}{found['loss_nats']:>10.4f}{found['perplexity']:>12.2f}")
        for layer, use in found.get("memory", {}).items():
            shares = f"MU {100 * use['mu']:.1f} %, top-1 MU {100 * use['top1_mu']:.1f} %"
            lines.append(f"  memory of layer {layer}: {shares}, KL_u {use['kl_u']:.2f}, KL_w {use['kl_w']:.2f}")
    return "\n".join([*lines, f"context: {results['context_rule']}"])
