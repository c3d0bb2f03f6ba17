"""JSON of a kNN run as it was written before records had a `format` everywhere: what this version must still read."""

import copy
from typing import Any

RULE = "whole lines packed into blocks of at most 32 tokens, each block with up to 32 tokens before it"
BLOCKS: dict[str, Any] = {
    "split": "valid", "tokens": 5, "blocks": 2, "blocks_per_unit": 8, "batch_blocks": 4, "context_window": 32,
    "block": 32, "context_rule": RULE,
}  # fmt: skip
SELF_TEST = {"run": True, "keys": 256, "k": 16, "nprobe": 4, "expected": 0.99, "found": 1.0, "first": 0.6}
STATES: dict[str, Any] = {
    "format": 1, "kind": "states", **BLOCKS, "tap": "last_output", "key_dtype": "float16", "model": "m" * 32,
    "dictionary": "d" * 32, "token_files": "t" * 32,
}  # fmt: skip
NEIGHBOURS: dict[str, Any] = {
    "format": 1, "kind": "neighbours", **BLOCKS, "k": 16, "nprobe": 4, "search": "index", "distances": "exact",
    "tap": "last_ffn_input", "width": 32, "key_dtype": "float16", "model": "m" * 32, "dictionary": "d" * 32,
    "token_files": "t" * 32, "datastore": "s" * 32, "index": "i" * 32, "self_test": SELF_TEST, "similarity": "dot",
}  # fmt: skip
CACHE: dict[str, Any] = {
    "format": 1, "kind": "cache", "split": "valid", "tokens": 5, "fill": "full", "windows": [2, 3],
    "thetas": [0.1, 1.0], "tap": "last_output", "states": "h" * 32, "context_rule": RULE, "model": "m" * 32,
    "token_files": "t" * 32,
}  # fmt: skip
UNIT: dict[str, Any] = {"rows": 5, "hashes": {"queries": "q" * 32, "targets": "y" * 32, "log_probs": "l" * 32}}
LOSSES: dict[str, Any] = {
    "format": 1, "kind": "losses", "split": "valid", "tokens": 5, "dictionary": "d" * 32, "context_rule": RULE,
    "model": "m" * 32, "token_files": "t" * 32, "hashes": {"targets": "y" * 32, "lm": "l" * 32},
}  # fmt: skip

_VALUES = {"edges": [12.5], "lambdas": [0.6, 0.1]}
_GATE = {"bias": -0.3, "thresholds": [0.0, 1.0], "weights": [0.25, -0.5]}
_LOSS = {"loss_nats": 2.75, "perplexity": 15.6}
_STORES: dict[str, Any] = {
    "lambdas": [0.2, 0.1],
    "stores": [
        {"run": run, "neighbours": "n" * 32, "datastore": "s" * 32, "temperature": 4.0, "k": 16}
        for run in ("", "../other")
    ],
}  # fmt: skip
CACHE_SETTINGS: dict[str, Any] = {"lambda": 0.1, "theta": 0.6, "window": 2000, "fill": "full", "tap": "output"}
TUNED_CACHE: dict[str, Any] = {
    **CACHE_SETTINGS, "loss_nats": 2.7, "perplexity": 14.9,
    "grid": {"lambdas": [0.0, 0.1], "thetas": [0.3, 0.6], "windows": [500, 2000],
             "loss_nats": [[[2.89, 2.8]] * 2, [[2.89, 2.75], [2.89, 2.7]]]},
    "edges": ["the best θ=0.6 is the largest of cache.thetas; add larger ones"], "cache": "f" * 32,
}  # fmt: skip
TUNED_BOTH: dict[str, Any] = {
    "knn_lambda": 0.2, "cache_lambda": 0.05, **_LOSS,
    "grid": {"knn_lambdas": [0.0, 0.2], "cache_lambdas": [0.0, 0.05], "loss_nats": [[2.89, 2.8], [2.8, 2.75]]},
    "edges": [],
}  # fmt: skip
TUNED_KNN: dict[str, Any] = {
    "lambda": 0.25, "temperature": 4.0, "k": 16,
    "grid": {"lambdas": [0.0, 0.25, 0.5], "temperatures": [1.0, 4.0], "ks": [4, 16],
             "loss_nats": [[[2.89, 2.85, 2.9]] * 2, [[2.89, 2.8, 2.9], [2.89, 2.776, 2.9]]], "buckets": 2},
    "edges": [], "neighbours": "n" * 32, "datastore": "s" * 32, "index": "i" * 32, "loss_nats": 2.776,
    "perplexity": 16.06,
}  # fmt: skip
TUNED_LM: dict[str, Any] = {
    "lm_loss_nats": 2.888, "lm_perplexity": 17.96, "split": "valid", "tokens": 217646, "model": "m" * 32,
}  # fmt: skip
TUNED: dict[str, Any] = {
    **TUNED_KNN, "halves_of": "documents", "halves": "g" * 32, "buckets": {**_VALUES, "halves": [_VALUES] * 2, **_LOSS},
    "gate": {**_GATE, "halves": [_GATE] * 2, **_LOSS}, "stores": {**_STORES, **_LOSS}, **TUNED_LM, "cache": TUNED_CACHE,
    "both": TUNED_BOTH, "both_buckets": {"cache_lambda": 0.05, **_VALUES, "halves": [_VALUES] * 2, **_LOSS},
}  # fmt: skip

_GAP = {"nats": -0.1, "nats_interval": [-0.2, 0.1], "perplexity": -1.9, "interval": [-2.5, -1.25]}
BOOTSTRAP: dict[str, Any] = {
    "over": "documents", "groups": 60, "resamples": 2000, "seed": 0, "level": 0.95,
    "intervals": {"lm": [17.1, 18.8], "knn": [15.25, 16.9]}, "differences": {"knn": {"lm": _GAP}},
}  # fmt: skip
GATE_CURVE: dict[str, Any] = {
    "wanted": [0.0, 0.5, 1.0], "skipped": [0.0, 0.49, 1.0], "loss_nats": [2.77, 2.8, 2.9],
    "perplexity": [16.0, 16.4, 18.0],
}  # fmt: skip
_RUNG = {**_LOSS, "recall": 0.87}
LADDER: dict[str, Any] = {
    "split": "test", "queries": 256, "k": 16, "searched": 16, "nprobe": 32,
    "lm": {"loss_nats": 2.9, "perplexity": 18.1}, "exact": {"loss_nats": 2.78, "perplexity": 16.119, "recall": 1.0},
    "rescored": {"loss_nats": 2.78, "perplexity": 16.25, "recall": 0.87},
    "quantised": {"loss_nats": 2.8, "perplexity": 16.5, "recall": 0.87}, "key": "k" * 32,
}  # fmt: skip


def split_of(lm: float, knn: float) -> dict[str, Any]:
    """A split's entry of results.json with these perplexities of the language model alone and with neighbours."""
    return {
        "tokens": 217646, "blocks": 503, "lm": {"loss_nats": 3.0, "perplexity": lm},
        "knn": {"loss_nats": 2.9, "perplexity": knn}, "retrieved": 0.71,
        "shuffled": {"lambda": 0.25, "loss_nats": 3.2, "ceiling_nats": 3.28, "alarm": False}, "neighbours": "n" * 32,
    }  # fmt: skip


KNN_RESULTS: dict[str, Any] = {
    "format": 1, "name": "<wikitext> & co",
    "model": {"parameters": 246933504, "fingerprint": "m" * 32, "step": 9, "checkpoint": "c"},
    "dictionary": {"hash": "d" * 32, "words": 267744}, "tokens": "t" * 32, "context_rule": "up to 2560 tokens",
    "settings": {"lambda": 0.25, "temperature": 4.0, "k": 16, "nprobe": 32, "distances": "exact", "search": "index"},
    "tuned_on": "valid", "splits": {"valid": split_of(17.96, 16.06), "test": split_of(18.65, 16.12)},
    "datastore": {"rows": 103225485, "width": 1024, "bytes": 211818695220, "dtype": "float16", "tap": "last_ffn_input",
                  "fingerprint": "s" * 32},
    "index": {"factory": "IVF4096,PQ64", "nlist": 4096, "bytes": 7432234920, "fingerprint": "i" * 32},
    "exactness": "exact", "self_test": {"keys": 256, "k": 16, "nprobe": 32, "found": 1.0, "first": 0.9},
    "seconds": {"train": 400.0, "knn search": 30.0}, "hashes": {"model": "0123abcd"},
    "code": {"distlm": "0.1.0", "git": None, "python": "3.11", "libraries": {}},
}  # fmt: skip
"""As a version wrote it that knew neither cache nor intervals, ladder and adaptive λ."""


def all_results() -> dict[str, Any]:
    """results.json with everything that can be in it."""
    tree: dict[str, Any] = copy.deepcopy(KNN_RESULTS)
    tree["settings"] |= {
        "similarity": "l2", "cache": CACHE_SETTINGS, "both": {"knn_lambda": 0.2, "cache_lambda": 0.05},
        "stores": _STORES, "adaptive": {"buckets": 64, "gate": True, "halves_of": "documents"},
    }  # fmt: skip
    known = ("tokens", "blocks", "words", "gate_curve", "lm", "cache", "knn", "knn_buckets", "gate", "stores", "both",
             "both_buckets", "retrieved", "shuffled", "neighbours", "cached", "cache_files", "bootstrap")  # fmt: skip
    for name, split in tree["splits"].items():
        split["lm"]["token_perplexity"] = 9.5
        split |= {part: dict(_LOSS) for part in ("cache", "knn_buckets", "gate", "stores", "both", "both_buckets")}
        split |= {"words": 200000, "gate_curve": GATE_CURVE, "cached": 0.9, "cache_files": "f" * 32,
                  "bootstrap": BOOTSTRAP}  # fmt: skip
        tree["splits"][name] = {field: split[field] for field in known}
    tree["self_test"] = {**SELF_TEST, "checked": 1106}
    names = [*tree]
    names.insert(names.index("self_test"), "ladder")
    return {name: tree.get(name, LADDER) for name in names}
