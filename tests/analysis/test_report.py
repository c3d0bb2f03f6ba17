"""report.html: one file, every number of results.json that a reader needs, pictures inside."""

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from msgspec import UNSET
from support.knn.files import (
    BOOTSTRAP,
    CACHE_SETTINGS,
    GATE_CURVE,
    KNN_RESULTS,
    LADDER,
    TUNED_BOTH,
    TUNED_CACHE,
    TUNED_KNN,
    TUNED_LM,
)
from support.records.examples import example

from distlm.analysis.report import write_report
from distlm.config.load import dump_config, load_config
from distlm.errors import DistlmError
from distlm.memory.records import MemoryUse
from distlm.runtime.rundir import RunDir
from distlm.training.records import LmResults, LmSplit


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(KNN_RESULTS))
    (tmp_path / "knn.json").write_text(json.dumps(TUNED_KNN | TUNED_LM))
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


def best(path: Path) -> list[str]:
    return re.findall(r'<strong class="best">(.*?)</strong>', path.read_text("utf-8"))


def test_the_best_of_each_column_is_bold_and_ties_all(run):
    assert best(write_report(run)) == ["16.06", "2.9000", "16.12", "2.9000"]
    results = copy.deepcopy(KNN_RESULTS)
    results["splits"]["valid"]["knn"]["perplexity"] = results["splits"]["valid"]["lm"]["perplexity"]
    results["splits"]["test"]["knn"]["perplexity"] = 99.0
    run.results.write_text(json.dumps(results))
    # On valid both, on test the language model.
    alone, tested = (f"{results['splits'][split]['lm']['perplexity']:.2f}" for split in ("valid", "test"))
    assert [text for text in best(write_report(run)) if "." in text and len(text) == 5] == [alone, tested, alone]


def test_every_figure_has_a_sentence_and_a_text_in_its_place(run):
    page = write_report(run).read_text("utf-8")
    figures = re.findall(r'<img src="[^"]*" alt="([^"]*)">\s*<figcaption><span class="seen">(.*?)</span>', page)
    assert len(figures) == 5
    assert all(seen and text.endswith(seen) for text, seen in figures)
    assert "λ = 0.25, T = 4 give 16.06 instead of the LM&#39;s 17.96, 10.6% less." in page


def test_settings_that_differ_from_the_recipe_are_shown_and_all_are_folded(run):
    assert "Configuration" not in write_report(run).read_text("utf-8")
    config = load_config("demo", ["name=<mine>", "train.lr=0.002", f"run_dir={run.root}", "datastore.tap=<tap>"])
    (run.root / "config.yaml").write_text(dump_config(config), "utf-8")
    path = write_report(run)
    page = path.read_text("utf-8")
    assert "<td>train.lr</td><td>0.002</td><td>0.003</td>" in page
    assert "<td>datastore.tap</td><td>&lt;tap&gt;</td><td>last_ffn_input</td>" in page
    assert "<code>demo</code>, the shipped recipe that the run is nearest to" in page
    differing = page[page.index("Configuration") : page.index("These settings differ")]
    assert differing.count("<td>") == 6
    assert "<details><summary>train</summary>" in page and "<details open" not in page
    read(path)
    (run.root / "config.yaml").write_text(dump_config(load_config("demo")), "utf-8")
    assert "No setting differs from <code>demo</code>" in write_report(run).read_text("utf-8")


def test_alarm_brute_force_and_missing_parts_are_shown(run):
    results = copy.deepcopy(KNN_RESULTS)
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


def test_cache_and_both_are_shown(run):
    results = copy.deepcopy(KNN_RESULTS)
    results["settings"] |= {"cache": CACHE_SETTINGS, "both": {"knn_lambda": 0.2, "cache_lambda": 0.05}}
    for split, perplexity in (("valid", 15.81), ("test", 15.79)):
        results["splits"][split] |= {"cache": {"loss_nats": 2.8, "perplexity": 17.5}, "cached": 0.9, "cache_files": "f",
                                     "both": {"loss_nats": 2.7, "perplexity": perplexity}}  # fmt: skip
    run.results.write_text(json.dumps(results))
    run.tuned.write_text(json.dumps({**TUNED_KNN, **TUNED_LM, "cache": TUNED_CACHE, "both": TUNED_BOTH}))
    tags = read(write_report(run))
    assert len(tags.links) == 6
    words = re.sub(r"\s+", " ", tags.text)
    for shown in ("15.79 from 18.65 without neighbours and cache", "17.50", "16.12", "λ=0.1, θ=0.6, window=2000",
                  "λ of kNN 0.2, λ of the cache 0.05", "+ kNN + cache"):  # fmt: skip
        assert shown in words, shown


def test_a_cache_without_neighbours_is_shown(run):
    results = copy.deepcopy(KNN_RESULTS)
    results |= {"index": None, "datastore": None, "self_test": None, "exactness": None}
    results["settings"] = {"cache": CACHE_SETTINGS}
    for split in results["splits"].values():
        for name in ("knn", "shuffled", "retrieved", "neighbours"):
            split.pop(name)
        split["cache"] = {"loss_nats": 2.8, "perplexity": 17.5}
    run.results.write_text(json.dumps(results))
    run.tuned.write_text(json.dumps({**TUNED_LM, "cache": TUNED_CACHE}))
    words = re.sub(r"\s+", " ", read(write_report(run)).text)
    assert "17.50 from 18.65 without the cache" in words
    assert "kNN" not in words
    assert "Datastore" not in words


def test_intervals_differences_ladder_and_curve_are_shown(run):
    results = copy.deepcopy(KNN_RESULTS)
    for number, split in enumerate(results["splits"].values()):
        gap = {"nats": -0.1, "nats_interval": [-0.2, 0.1], "perplexity": -1.9, "interval": [-2.5, -1.25 + 2 * number]}
        split |= {
            "knn_buckets": {"loss_nats": 2.75, "perplexity": 15.72}, "gate": {"loss_nats": 2.77, "perplexity": 15.9},
            "gate_curve": GATE_CURVE, "bootstrap": {**BOOTSTRAP, "differences": {"knn": {"lm": gap}}},
        }  # fmt: skip
    results["settings"]["adaptive"] = {"buckets": 64, "gate": True, "halves_of": "documents"}
    results["ladder"] = LADDER
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


@pytest.mark.parametrize("values", [UNSET, 0, 4096])
def test_a_model_evaluated_alone_has_a_page(tmp_path, values):
    found = example(LmResults)
    found.splits = {"valid": LmSplit(tokens=217646, loss_nats=2.8, perplexity=16.44)}
    if values is not UNSET:
        # Of no reads there is no divergence.
        use = MemoryUse(mu=0.9, top1_mu=0.25, kl_u=1.5, kl_w=None, gini=0.5)
        found.splits["valid"].memory = {"3": use} if values else {}
    found.model.memory_values = values
    run = RunDir(tmp_path)
    found.write(run.root / "lm.json")
    words = re.sub(r"\s+", " ", read(write_report(run)).text)
    assert "16.44" in words and "217,646" in words
    assert ("Masked language model" in words) == (values is not UNSET)
    assert ("Use of the memory" in words) == ("25.0 %" in words) == (values == 4096)
