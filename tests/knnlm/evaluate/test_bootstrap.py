"""Documents of a text, and intervals over them."""

import math
from pathlib import Path

import numpy as np
import pytest
from support.knn.files import STATES
from support.present import present

from distlm.data.blocks import eval_blocks
from distlm.data.dictionary import Dictionary
from distlm.knnlm.evaluate.bootstrap import RESAMPLES, SEED, bootstrap
from distlm.knnlm.evaluate.documents import Groups, document_starts, group_tokens
from distlm.knnlm.evaluate.records import Bootstrap, Results
from distlm.knnlm.evaluate.table import results_table
from distlm.knnlm.search.records import StatesPlan
from distlm.knnlm.tune.adaptive import figures
from distlm.runtime.rundir import RunDir

DICTIONARY = Dictionary(["the", "=", "Rome", "History", "."], [9, 8, 3, 2, 5])


def encode(text: str) -> np.ndarray:
    """Ids of some lines; each ends with </s>."""
    return np.array([i for line in text.split("\n") for i in (*(DICTIONARY.ids[w] for w in line.split()), 2)], np.int32)


def test_titles_begin_documents_and_sections_do_not():
    text = (
        "\n = Rome = \n\n the . \n = = History = = \n the = . = \n = = = Rome = = = \n = the Rome = \n the . \n = =\n="
    )
    ids = encode(text)
    starts = document_starts(ids, DICTIONARY)
    assert len(starts) == 2
    assert [ids[start + 1] for start in starts] == [DICTIONARY.ids["Rome"], DICTIONARY.ids["the"]]
    assert len(document_starts(ids, Dictionary(["the"], [1]))) == 0


def test_a_model_that_cannot_predict_the_text_has_finite_figures():
    """Hundreds of nats for a word of several tokens."""
    groups = ragged()
    scores = {"lm": np.full(groups.tokens, -300.0), "knn": np.full(groups.tokens, -299.0)}
    found = bootstrap(scores, groups, tokens_per_word=4.0)
    assert all(math.isfinite(end) for interval in present(found.intervals).values() for end in interval)
    assert present(found.differences)["knn"]["lm"].nats == -1
    assert figures(np.full(3, -800.0)).perplexity == math.exp(700)


def test_few_documents_give_blocks_and_many_give_documents():
    source = StatesPlan(**{**STATES, "context_window": 4, "block": 8})
    few, many = encode("\n".join([" = Rome = ", "the ."] * 9)), encode("\n".join(["", *[" = Rome = ", "the ."] * 12]))
    groups = group_tokens(few, DICTIONARY, source)
    assert groups.kind == "blocks"
    np.testing.assert_array_equal(groups.starts, eval_blocks(few, 4, 8).start)
    groups = group_tokens(many, DICTIONARY, source)
    assert (groups.kind, len(groups.starts), groups.starts[0]) == ("documents", 12, 0)
    assert groups.numbers.tolist()[:9] == [0] * 8 + [1]
    assert np.bincount(groups.halves).tolist() == [6 * 7 + 1, 6 * 7]


def scores(groups: Groups, seed=0):
    random = np.random.default_rng(seed)
    hardness = random.normal(0, 1.0, len(groups.starts))[groups.numbers]
    lm = -random.gamma(2.0, 1.0, groups.tokens) - 3 - hardness
    return {"lm": lm, "knn": lm + 0.1 + random.normal(0, 0.05, groups.tokens)}


def ragged(count=40, seed=1):
    sizes = np.random.default_rng(seed).integers(5, 60, count)
    return Groups("documents", np.concatenate([[0], np.cumsum(sizes)[:-1]]), int(sizes.sum()))


def test_intervals_are_those_of_resampling_documents_one_by_one():
    groups = ragged()
    log_probs = scores(groups)
    found = bootstrap(log_probs, groups)
    bounds = [*groups.starts.tolist(), groups.tokens]
    random = np.random.Generator(np.random.Philox(key=[3, SEED]))
    perplexities, gaps = [], []
    for times in random.multinomial(40, np.full(40, 1 / 40), size=RESAMPLES):
        rows = np.concatenate([np.tile(np.arange(bounds[g], bounds[g + 1]), n) for g, n in enumerate(times) if n])
        lm, knn = (-log_probs[name][rows].mean() for name in ("lm", "knn"))
        perplexities.append(math.exp(lm))
        gaps.append(knn - lm)
    np.testing.assert_allclose(present(found.intervals)["lm"], np.quantile(perplexities, [0.025, 0.975]), rtol=1e-9)
    gap = present(found.differences)["knn"]["lm"]
    np.testing.assert_allclose(gap.nats_interval, np.quantile(gaps, [0.025, 0.975]), rtol=1e-9)
    assert gap.nats_interval[0] < gap.nats < gap.nats_interval[1] < 0
    assert present(found.intervals)["lm"][0] < math.exp(-log_probs["lm"].mean()) < present(found.intervals)["lm"][1]
    assert bootstrap(log_probs, groups) == found


def test_paired_differences_are_far_narrower_than_the_perplexities():
    groups = ragged(60)
    found = bootstrap(scores(groups), groups)
    low, high = present(found.intervals)["knn"]
    gap = present(found.differences)["knn"]["lm"].interval
    assert gap[1] - gap[0] < (high - low) / 5


def test_an_equal_model_has_no_difference_and_one_group_no_interval():
    groups = ragged()
    lm = scores(groups)["lm"]
    same = bootstrap({"lm": lm, "cache": lm}, groups)
    assert present(same.differences)["cache"]["lm"].interval == (0.0, 0.0)
    assert bootstrap({"lm": lm}, Groups("blocks", np.array([0]), len(lm))) == Bootstrap("blocks", 1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(60):
        groups = Groups("documents", np.arange(0, 1500, 30), 1500)
        random = np.random.default_rng(seed)
        losses = 4 + random.normal(0, 0.5, 50)[groups.numbers] + random.normal(0, 1, 1500)
        low, high = np.log(present(bootstrap({"lm": -losses}, groups).intervals)["lm"])
        inside += low < 4 < high
    assert 50 <= inside <= 60


def test_results_and_table_show_them(searched):
    results = Results.read(RunDir(Path(searched.run_dir)).results)
    for split in results.splits.values():
        boot, knn = present(split.bootstrap), present(split.knn)
        intervals = present(boot.intervals)
        assert boot.over == "blocks"
        assert boot.groups == split.blocks
        assert intervals["knn"][0] < knn.perplexity < intervals["knn"][1]
        gap = present(boot.differences)["knn"]["lm"]
        assert gap.perplexity == pytest.approx(knn.perplexity - split.lm.perplexity, rel=1e-9)
    low, high = present(present(results.splits["test"].bootstrap).intervals)["lm"]
    assert f"[{low:.2f}, {high:.2f}]" in results_table(results)
