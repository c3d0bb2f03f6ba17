"""report.html: one file, every number of results.json that a reader needs, pictures inside."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distlm.analysis.report import write_report
from distlm.errors import DistlmError
from distlm.runtime.rundir import RunDir


def figures(lm, knn):
    return {
        "tokens": 217646, "blocks": 503, "lm": {"loss_nats": 3.0, "perplexity": lm},
        "knn": {"loss_nats": 2.9, "perplexity": knn}, "retrieved": 0.71, "neighbours": "n" * 32,
        "shuffled": {"lambda": 0.25, "loss_nats": 3.2, "ceiling_nats": 3.28, "alarm": False},
    }  # fmt: skip


RESULTS = {
    "format": 1, "name": "<wikitext> & co", "model": {"parameters": 246933504, "fingerprint": "m", "step": 9,
    "checkpoint": "c"}, "dictionary": {"hash": "d", "words": 267744}, "tokens": "t",
    "context_rule": "up to 2560 tokens",
    "settings": {"lambda": 0.25, "temperature": 4.0, "k": 16, "nprobe": 32, "distances": "exact", "search": "index"},
    "tuned_on": "valid", "splits": {"valid": figures(17.96, 16.06), "test": figures(18.65, 16.12)},
    "datastore": {"rows": 103225485, "width": 1024, "bytes": 211818695220, "dtype": "float16", "tap": "last_ffn_input",
                  "fingerprint": "s"},
    "index": {"factory": "IVF4096,PQ64", "nlist": 4096, "bytes": 7432234920, "fingerprint": "i"}, "exactness": "exact",
    "self_test": {"keys": 256, "k": 16, "first": 0.9, "found": 1.0}, "seconds": {"train": 400.0, "knn search": 30.0},
    "hashes": {"model": "0123abcd"}, "code": {"distlm": "0.1.0", "git": None, "python": "3.11", "libraries": {}},
}  # fmt: skip
TUNED = {
    "lambda": 0.25, "temperature": 4.0, "k": 16, "perplexity": 16.06, "lm_perplexity": 17.96, "split": "valid",
    "grid": {"lambdas": [0.0, 0.25, 0.5], "temperatures": [1.0, 4.0], "ks": [4, 16],
             "loss_nats": [[[2.89, 2.85, 2.9]] * 2, [[2.89, 2.8, 2.9], [2.89, 2.776, 2.9]]]},
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    run.results.write_text(json.dumps(RESULTS))
    run.tuned.write_text(json.dumps(TUNED))
    for step in range(1, 30):
        run.metrics.write("train", {"train/loss": 9 / step + 3, "train/lr": 0.1}, step=step)
    run.metrics.write("train", {"valid/loss": 4.0, "valid/ppl": 54.6}, step=20)
    return run


class Tags(HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text("utf-8"))
    assert tags.open == []
    return tags


def test_the_report_is_one_file_with_all_figures(run):
    path = write_report(run)
    tags = read(path)
    assert len(tags.links) == 5
    for link in tags.links:
        kind, _, data = link.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data)[:8] == b"\x89PNG\r\n\x1a\n"
    words = re.sub(r"\s+", " ", tags.text)
    for shown in ("16.06", "16.12", "from 18.65", "217,646", "103,225,485 rows", "211.8 GB", "up to 2560 tokens",
                  "IVF4096,PQ64", "0123abcd", "246,933,504", "<wikitext> & co"):  # fmt: skip
        assert shown in words, shown
    assert "http" not in path.read_text("utf-8")
    assert "misaligned" not in words


def test_alarm_brute_force_and_missing_parts_are_shown(run):
    results = json.loads(json.dumps(RESULTS))
    results |= {"index": None, "seconds": {}}
    results["settings"]["nprobe"] = None
    results["splits"]["test"]["shuffled"]["alarm"] = True
    run.results.write_text(json.dumps(results))
    run.tuned.unlink()
    run.metrics.path.unlink()
    tags = read(write_report(run))
    assert tags.links == []
    assert "On test the neighbours' values are no better" in tags.text
    assert "brute force" in tags.text


def test_an_unevaluated_run_is_named(tmp_path):
    with pytest.raises(DistlmError, match="distlm knn evaluate"):
        write_report(RunDir(tmp_path))


CACHE = {
    "cache": {
        "lambda": 0.1, "theta": 0.6, "window": 2000, "fill": "full", "tap": "output", "loss_nats": 2.7,
        "perplexity": 14.9, "cache": "f", "edges": [],
        "grid": {"lambdas": [0.0, 0.1], "thetas": [0.3, 0.6], "windows": [500, 2000],
                 "loss_nats": [[[2.89, 2.8]] * 2, [[2.89, 2.75], [2.89, 2.7]]]},
    },
    "both": {"knn_lambda": 0.2, "cache_lambda": 0.05},
}  # fmt: skip


def test_cache_and_both_are_shown(run):
    results = json.loads(json.dumps(RESULTS))
    results["settings"] |= CACHE
    for split, perplexity in (("valid", 15.81), ("test", 15.79)):
        results["splits"][split] |= {"cache": {"loss_nats": 2.8, "perplexity": 17.5}, "cached": 0.9, "cache_files": "f",
                                     "both": {"loss_nats": 2.7, "perplexity": perplexity}}  # fmt: skip
    run.results.write_text(json.dumps(results))
    run.tuned.write_text(json.dumps({**TUNED, **CACHE}))
    tags = read(write_report(run))
    assert len(tags.links) == 6
    words = re.sub(r"\s+", " ", tags.text)
    for shown in ("15.79 from 18.65 without neighbours and cache", "17.50", "16.12", "λ=0.1, θ=0.6, window=2000",
                  "λ of kNN 0.2, λ of the cache 0.05", "+ kNN + cache"):  # fmt: skip
        assert shown in words, shown


def test_a_cache_without_neighbours_is_shown(run):
    results = json.loads(json.dumps(RESULTS))
    results |= {"index": None, "datastore": None, "self_test": None, "exactness": None}
    results["settings"] = {"cache": CACHE["cache"]}
    for split in results["splits"].values():
        for name in ("knn", "shuffled", "retrieved", "neighbours"):
            split.pop(name)
        split["cache"] = {"loss_nats": 2.8, "perplexity": 17.5}
    run.results.write_text(json.dumps(results))
    tuned = {"split": "valid", "lm_perplexity": 17.96, "cache": CACHE["cache"]}
    run.tuned.write_text(json.dumps(tuned))
    words = re.sub(r"\s+", " ", read(write_report(run)).text)
    assert "17.50 from 18.65 without the cache" in words
    assert "kNN" not in words
    assert "Datastore" not in words


def test_intervals_differences_ladder_and_curve_are_shown(run):
    results = json.loads(json.dumps(RESULTS))
    curve = {
        "wanted": [0, 0.5, 1],
        "skipped": [0, 0.49, 1],
        "loss_nats": [2.77, 2.8, 2.9],
        "perplexity": [16, 16.4, 18],
    }
    for number, split in enumerate(results["splits"].values()):
        gap = {"nats": -0.1, "nats_interval": [-0.2, 0.1], "perplexity": -1.9, "interval": [-2.5, -1.25 + 2 * number]}
        split |= {
            "knn_buckets": {"loss_nats": 2.75, "perplexity": 15.72}, "gate": {"loss_nats": 2.77, "perplexity": 15.9},
            "gate_curve": curve,
            "bootstrap": {"over": "documents", "groups": 60, "resamples": 2000, "seed": 0, "level": 0.95,
                          "intervals": {"lm": [17.1, 18.8], "knn": [15.25, 16.9]}, "differences": {"knn": {"lm": gap}}},
        }  # fmt: skip
    results["settings"]["adaptive"] = {"buckets": 64, "gate": True, "halves_of": "documents"}
    rung = {"loss_nats": 2.8, "perplexity": 16.5, "recall": 0.87}
    results["ladder"] = {
        "split": "test", "queries": 256, "k": 16, "searched": 16, "nprobe": 32, "key": "x", "quantised": rung,
        "lm": {"loss_nats": 2.9, "perplexity": 18.1}, "exact": {"loss_nats": 2.78, "perplexity": 16.119, "recall": 1.0},
        "rescored": {"loss_nats": 2.78, "perplexity": 16.25, "recall": 0.87},
    }  # fmt: skip
    run.results.write_text(json.dumps(results))
    tags = read(write_report(run))
    assert len(tags.links) == 6
    words = re.sub(r"\s+", "", tags.text)  # cells stand beside each other
    for shown in (
        "16.06 15.25 to 16.90", "+ kNN, λ by distance 15.72", "each half of its documents is mixed with",
        "+ kNN against LM -1.90 -2.50 to -1.25 better -1.90 -2.50 to 0.75 undecided", "60 documents of valid",
        "true distances 87.0 % 16.250 +0.131", "256 tokens spread over test", "Skipped searches",
        "16.12 from 18.65 without neighbours",
    ):  # fmt: skip
        assert shown.replace(" ", "") in words, shown
