"""Perplexity of an index over a sample of the store."""

from pathlib import Path

import pytest

from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.index.choose.measure import build, draw_sample
from distlm.knnlm.search.neighbours import Neighbours
from distlm.knnlm.tune.choose import IndexPerplexity
from distlm.runtime.rundir import RunDir


def test_all_keys_give_the_perplexity_of_the_whole_store(searched: RunConfig) -> None:
    run = RunDir(Path(searched.run_dir))
    datastore, neighbours = Datastore.open(run.datastore), Neighbours.open(run.neighbours(searched.knn.splits[0]))
    # One query is held back, so all keys but one are there.
    sample = draw_sample(datastore, datastore.rows, 1, 4, seed=1)
    perplexity = IndexPerplexity(neighbours, datastore, sample, searched.knn, neighbours.tokens)
    assert len(perplexity.targets) == neighbours.tokens
    index = build("IVF8,Flat", sample, 1).index
    found = perplexity(index, 8)
    assert perplexity(index, 8, 2) == pytest.approx(found), "true keys: more candidates change nothing"
    assert found < perplexity.of_lm
    fewer = IndexPerplexity(neighbours, datastore, sample, searched.knn, 50)
    assert len(fewer.targets) == 50 and fewer(index, 8) == pytest.approx(found, rel=0.5)
