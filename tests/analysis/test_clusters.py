"""Likelihood of states under a Gaussian mixture, by loss."""

import csv
from pathlib import Path

import numpy as np
import pytest
from support.pictures import description

from distlm.analysis.clusters import Clusters, Settings, fit_mixture, report_clusters, sample_keys
from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.knnlm.evaluate.losses import Losses
from distlm.runtime.rundir import RunDir

SOME = Settings(words=5, rows=300, components=3)


def test_distance_and_order_by_hand() -> None:
    found = Clusters("a", 9, np.array([0.0, 1.0, 2.0]), np.array([2.0, 3.0]))
    # Of six pairs five have the low loss likelier, and one is a tie.
    assert found.ordered == pytest.approx(5.5 / 6)
    assert found.distance == pytest.approx(1.5 / np.std([0, 1, 2, 2, 3]))


def test_a_mixture_finds_clusters() -> None:
    random = np.random.default_rng(0)
    clustered = np.concatenate([random.normal(centre, 0.1, (100, 4)) for centre in (-3, 0, 3)])
    mixture = fit_mixture(clustered, SOME)
    near, far = mixture.score_samples(np.zeros((1, 4))), mixture.score_samples(np.full((1, 4), 1.5))
    assert near > far + 50


def test_the_sample_is_of_the_words_alone_and_each_key_once(finished: RunConfig) -> None:
    store = Datastore.open(RunDir(Path(finished.run_dir)).datastore)
    assert len(store.shards) > 3
    values = np.concatenate([store.values(shard.index) for shard in store.shards])
    keys = np.concatenate([store.keys(shard.index) for shard in store.shards])
    words = np.array([4, 6])
    every = sample_keys(store, words, 10**6, 1)
    assert np.array_equal(every, keys[np.isin(values, words)])
    some = sample_keys(store, words, 50, 1)
    assert len(np.unique(some, axis=0)) == len(some) == 50
    assert {row.tobytes() for row in some} <= {row.tobytes() for row in every}
    assert not np.array_equal(some, sample_keys(store, words, 50, 2))


def test_a_real_run_gives_the_figure_its_data_and_the_table(finished: RunConfig, tmp_path: Path) -> None:
    runs = [finished.run_dir, f"{finished.run_dir}:knn"]
    text = report_clusters(runs, "valid", SOME, tmp_path / "figure.png")
    assert "w0-s1: LM" in text and "w0-s1: + kNN" in text and "words: w0 w1" in text
    assert (tmp_path / "figure.md").read_text("utf-8").strip() in text
    seen = description(tmp_path / "figure.png")
    assert seen in text and "% of all pairs in w0-s1: LM; " in seen and seen.endswith("(50%: as likely).")
    losses = Losses.open(RunDir(Path(finished.run_dir)).losses, "valid", "lm")
    frequent = np.isin(losses.targets, np.arange(4, 9))
    with (tmp_path / "figure.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["run"] == "w0-s1: LM"]
    counts = {group: sum(int(row["tokens"]) for row in rows if row["loss"] == group) for group in ("low", "high")}
    # The default threshold is the median.
    assert sum(counts.values()) == frequent.sum() and abs(counts["low"] - counts["high"]) <= 1
    areas = sum(float(row["density"]) * (float(row["to"]) - float(row["from"])) for row in rows)
    assert areas == pytest.approx(2)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert report_clusters(runs, "valid", SOME, tmp_path / "again.png").replace("again", "figure") == text


def test_what_cannot_be_is_refused(finished: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(DistlmError, match="every loss is at most 1000 nats; choose another --threshold"):
        report_clusters([finished.run_dir], "valid", Settings(words=5, threshold=1000.0), tmp_path / "a.png")
    with pytest.raises(DistlmError, match="too few for 900 Gaussians; take more --words"):
        report_clusters([finished.run_dir], "valid", Settings(1, 900, 900), tmp_path / "a.png")
    with pytest.raises(UsageError, match="--words 0: must be at least 1"):
        Settings(words=0).check()
    assert not list(tmp_path.iterdir())
