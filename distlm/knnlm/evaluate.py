"""Perplexities of every split with the frozen settings, and everything needed to read them: results.json.

Perplexity is per word: exp of −Σ log p / tokens over every token of the split, </s> and <unk> included, fp64 sums in
token order. Schema of results.json (losses in nats per token, sizes in bytes):

  format          1
  name            of the run
  model           {parameters, fingerprint, step, checkpoint}
  dictionary      {hash, words}
  tokens          fingerprint of the token files
  context_rule    in words; which context each evaluated token sees
  settings        {lambda, temperature, k, nprobe, distances: exact|quantised, search: index|brute}
  tuned_on        the split the settings were chosen on; every other split is evaluated with them as they are
  splits          NAME → {tokens, blocks, lm: {loss_nats, perplexity}, knn: {loss_nats, perplexity}, neighbours,
                  retrieved: share of tokens whose target is among the neighbours,
                  shuffled: {lambda, loss_nats, ceiling_nats, alarm}}
  datastore       {rows, width, bytes, dtype, tap, fingerprint}
  index           {factory, nlist, bytes, fingerprint}, or null for a brute-force search
  exactness       in words; what the distances are
  self_test       {keys, k, first, found}: stored keys that find their own row
  seconds         stage → seconds over all its starts, from metrics.jsonl, and this evaluation
  hashes          fingerprints of all of the above by name
  code            versions

`shuffled` is the check for misaligned rows: with the values of a unit's neighbours permuted, retrieval carries no
information and the loss must rise to almost the LM's − ln(1 − λ) (`ceiling_nats`, an upper bound: a little is won back
by frequent words). `alarm` is true when the true values are hardly better than the permuted ones.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.config.schema import ModelConfig
from distlm.data.tokens import TokenFiles
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index import index_info
from distlm.knnlm.neighbours import Neighbours
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.seconds import stage_seconds
from distlm.knnlm.tune import split_knn_log_probs
from distlm.models.io import model_fingerprint, read_model_card
from distlm.models.transformer_lm import count_parameters
from distlm.runtime.collective import rank0_first
from distlm.runtime.files import read_json, write_json
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.progress import say
from distlm.runtime.rundir import code_version
from distlm.runtime.stage import Stage

FORMAT = 1
ALARM_LAMBDA = 0.25
"""λ of the shuffled check where the frozen λ is 0."""
ALARM_NATS, ALARM_ERRORS = 0.005, 4.0
"""True values must beat permuted ones by this many nats per token, and by this many standard errors of the mean."""


@dataclass(frozen=True)
class Frozen:
    """The settings of knn.json."""

    weight: float
    temperature: float
    k: int
    split: str
    neighbours: str


def run_evaluate(stage: Stage) -> dict[str, Any]:
    """Evaluate every split of knn.splits with the settings frozen in knn.json and write results.json.

    Returns SPLIT/lm and SPLIT/knn perplexities. Rank 0 works alone. Raises DistlmError when nothing was tuned, when
    knn.json was tuned on other neighbours, or when a split's neighbours are of another store, index or model.
    """
    return rank0_first(stage.comm, lambda: _evaluate(stage))


def read_frozen(tuned: dict[str, Any]) -> Frozen:
    """The frozen part of knn.json."""
    return Frozen(tuned["lambda"], tuned["temperature"], tuned["k"], tuned["split"], tuned["neighbours"])


def _evaluate(stage: Stage) -> dict[str, Any]:
    start = time.monotonic()
    run, knn = stage.run, stage.config.knn
    if not run.tuned.exists():
        raise DistlmError(f"{run.tuned}: nothing is tuned yet; run `distlm knn tune` first")
    frozen = read_frozen(read_json(run.tuned, "frozen kNN settings"))
    opened = {split: Neighbours.open(run.neighbours(split)) for split in knn.splits}
    store, tokens, index = _check(stage, frozen, opened)
    checkpoint = run.model_checkpoint(stage.config)
    card = read_model_card(checkpoint)
    first = opened[knn.splits[0]].manifest
    splits = {split: evaluate_split(neighbours, frozen) for split, neighbours in opened.items()}
    results = {
        "format": FORMAT,
        "name": stage.config.name,
        "model": {
            "parameters": count_parameters(ModelConfig(**card["config"]), card["vocabulary"]),
            "fingerprint": first["model"], "step": card.get("step"), "checkpoint": str(checkpoint),
        },
        "dictionary": {"hash": tokens.dictionary.hash, "words": len(tokens.dictionary)},
        "tokens": tokens.fingerprint,
        "context_rule": first["context_rule"],
        "settings": {
            "lambda": frozen.weight, "temperature": frozen.temperature, "k": frozen.k,
            **{name: first[name] for name in ("nprobe", "distances", "search")},
        },
        "tuned_on": frozen.split,
        "splits": splits,
        "datastore": {
            "rows": store.rows, "width": store.width, "bytes": store.bytes, "dtype": store.key_dtype.name,
            "tap": store.tap, "fingerprint": store.fingerprint,
        },
        "index": index,
        "exactness": exactness(first),
        "self_test": first["self_test"],
        "seconds": {},
        "hashes": {
            "model": first["model"], "dictionary": tokens.dictionary.hash, "tokens": tokens.fingerprint,
            "datastore": store.fingerprint, "index": first["index"],
            **{f"neighbours/{split}": neighbours.fingerprint for split, neighbours in opened.items()},
        },
        "code": code_version(),
    }  # fmt: skip
    for split, result in splits.items():
        if result["shuffled"]["alarm"]:
            say(
                f"knn evaluate: ALARM: on {split} the neighbours' values are no better than permuted ones; rows of "
                "values and keys may be misaligned: run `distlm datastore verify` and look at the self-test"
            )
    seconds = time.monotonic() - start
    run.metrics.write("knn evaluate", {STAGE_SECONDS: round(seconds, 3)})
    results["seconds"] = stage_seconds(run.metrics.path)
    write_json(run.results, results)
    summary: dict[str, Any] = {"seconds": seconds}
    for split, result in splits.items():
        summary |= {f"{split}/lm": result["lm"]["perplexity"], f"{split}/knn": result["knn"]["perplexity"]}
    return summary


def _check(
    stage: Stage, frozen: Frozen, opened: dict[str, Neighbours]
) -> tuple[Datastore, TokenFiles, dict[str, Any] | None]:
    """Open the rest, and refuse what does not belong together."""
    run, knn = stage.run, stage.config.knn
    tuned_on = opened.get(frozen.split)
    if tuned_on is None or frozen.split != knn.splits[0]:
        raise DistlmError(
            f"{run.tuned}: tuned on {frozen.split!r}, knn.splits={knn.splits} names {knn.splits[0]!r} first; "
            "run `distlm knn tune` again"
        )
    if tuned_on.fingerprint != frozen.neighbours:
        raise DistlmError(
            f"{run.tuned}: tuned on other neighbours ({frozen.neighbours}; {tuned_on.folder} is "
            f"{tuned_on.fingerprint}); run `distlm knn tune` again"
        )
    store = Datastore.open(run.datastore)
    tokens = TokenFiles.open(run.tokens(stage.config))
    index = index_info(run.index)["index"] if knn.search == "index" else None
    fingerprint = model_fingerprint(run.model_checkpoint(stage.config))
    for neighbours in opened.values():
        neighbours.require({"datastore": store.fingerprint}, str(store.folder))
        neighbours.require({"model": fingerprint}, "the checkpoint")
        neighbours.require({"token_files": tokens.fingerprint}, str(tokens.folder))
        neighbours.require({"index": index["fingerprint"] if index else "brute"}, str(run.index))
        same = ("k", "nprobe", "search", "distances", "context_rule", "tap", "key_dtype")
        neighbours.require({key: tuned_on.manifest[key] for key in same}, str(tuned_on.folder))
    if index is not None:
        index = {key: index[key] for key in ("factory", "nlist", "bytes", "fingerprint")}
    return store, tokens, index


def evaluate_split(neighbours: Neighbours, frozen: Frozen) -> dict[str, Any]:
    """One split's entry of results.json."""
    log_lm = neighbours.log_probs()
    log_knn = split_knn_log_probs(neighbours, frozen.temperature, [frozen.k])[0]
    return {
        "tokens": neighbours.tokens,
        "blocks": neighbours.manifest["blocks"],
        "lm": _figures(mean_loss(log_lm)),
        "knn": _figures(mean_loss(interpolate(log_lm, log_knn, frozen.weight))),
        "retrieved": float(np.mean(np.isfinite(log_knn))),
        "shuffled": shuffled_check(neighbours, frozen, log_lm, log_knn),
        "neighbours": neighbours.fingerprint,
    }


def shuffled_check(
    neighbours: Neighbours, frozen: Frozen, log_lm: npt.NDArray[np.float64], log_knn: npt.NDArray[np.float64]
) -> dict[str, Any]:
    """The loss with every unit's values permuted, beside the bound it must come near. See the module's docstring."""
    weight = frozen.weight or ALARM_LAMBDA
    shuffled = []
    for number, unit in enumerate(neighbours.units()):
        values = shuffle_values(unit.values, number)
        scores = knn_log_probs(unit.distances, values, unit.targets, frozen.temperature, [frozen.k])
        shuffled.append(scores[0])
    mixed = interpolate(log_lm, np.concatenate(shuffled), weight)
    gain = interpolate(log_lm, log_knn, weight) - mixed
    noise = float(np.std(gain)) / math.sqrt(len(gain))
    return {
        "lambda": weight,
        "loss_nats": mean_loss(mixed),
        "ceiling_nats": mean_loss(log_lm) - math.log1p(-weight),
        "alarm": bool(np.mean(gain) < max(ALARM_NATS, ALARM_ERRORS * noise)),
    }


def shuffle_values(values: npt.NDArray[np.int32], seed: int) -> npt.NDArray[np.int32]:
    """The values [q, k] permuted among all neighbours of the unit; −1 stay where they are."""
    random = np.random.Generator(np.random.Philox(key=[1, seed]))
    permuted = np.array(values)
    present = permuted >= 0
    permuted[present] = random.permutation(permuted[present])
    return permuted


def exactness(manifest: dict[str, Any]) -> str:
    """What the distances are, in words."""
    if manifest["search"] == "brute":
        return "exact: every stored key was compared, squared L2 over the true keys"
    if manifest["distances"] == "exact":
        return "neighbours found by the index (approximate), their squared L2 recomputed over the true keys (exact)"
    return "neighbours and distances as the index gives them (approximate): squared L2 to the encoded keys"


def _figures(loss: float) -> dict[str, float]:
    return {"loss_nats": loss, "perplexity": math.exp(loss)}
