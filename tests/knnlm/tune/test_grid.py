"""The grid in one pass against scoring each point on its own in fp64."""

import numpy as np
import pytest
from support.knn import random_case

from distlm.config.schema import KnnConfig
from distlm.knnlm.scoring import interpolate, knn_log_probs, mean_loss
from distlm.knnlm.search.neighbours import Neighbours, Unit
from distlm.knnlm.tune import grid
from distlm.knnlm.tune.grid import grid_log_probs, grid_losses

TEMPERATURES = [0.01, 0.5, 1.0, 30.0, 1e6]


def unit_of(seed: int, queries: int = 40, offset: float = 0.0) -> Unit:
    distances, values, targets = random_case(seed, queries)
    # Some rows without any neighbour, one hit far behind the nearest neighbour, and large equal norms.
    values[1] = -1
    distances = np.where(values < 0, np.inf, distances + offset).astype(np.float32)
    values[2], values[2, -1], targets[2] = 4, 1, 1
    distances[2, :] = [1.0 + offset] * 11 + [3000.0 + offset]
    log_probs = -np.random.default_rng(seed).gamma(2.0, 1.0, queries)
    return Unit(
        np.zeros((queries, 2), np.float16), targets, log_probs, np.zeros_like(values, np.int64), distances, values
    )


@pytest.mark.parametrize("offset", [0.0, 900.0])
def test_every_point_is_what_scoring_gives(offset):
    unit, ks = unit_of(0, offset=offset), [12, 1, 5]
    found = grid_log_probs(unit, TEMPERATURES, ks)
    assert found.shape == (3, 5, 40)
    for place, temperature in enumerate(TEMPERATURES):
        exact = knn_log_probs(unit.distances, unit.values, unit.targets, temperature, ks)
        np.testing.assert_allclose(found[:, place], exact, atol=1e-6, rtol=1e-6)
    assert np.isneginf(found[:, :, 1]).all()
    assert np.isneginf(found[1]).any()


def test_losses_over_units_and_chunks(monkeypatch):
    units = [unit_of(seed, queries) for seed, queries in ((1, 30), (2, 17), (3, 40))]

    class Kept(Neighbours):
        tokens = 87

        def units(self):
            return iter(units)

    knn = KnnConfig(lambdas=[0.0, 0.3, 0.95], temperatures=TEMPERATURES, ks=[3, 12])
    kept = Kept(None, {})  # type: ignore[arg-type]
    ticks = []
    losses = grid_losses(kept, knn, lambda: ticks.append(1))
    assert len(ticks) == 3
    log_lm = kept.log_probs()
    for row, k in enumerate(knn.ks):
        for column, temperature in enumerate(TEMPERATURES):
            parts = [knn_log_probs(u.distances, u.values, u.targets, temperature, [k])[0] for u in units]
            for place, weight in enumerate(knn.lambdas):
                expected = mean_loss(interpolate(log_lm, np.concatenate(parts), weight))
                assert losses[row, column, place] == pytest.approx(expected, abs=1e-7)
    assert (losses[:, :, 0] == mean_loss(log_lm)).all()
    monkeypatch.setattr(grid, "CELLS", 5 * 12)
    np.testing.assert_allclose(grid_losses(kept, knn), losses, rtol=1e-12)
