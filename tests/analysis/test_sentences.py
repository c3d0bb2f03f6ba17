"""What a figure's sentence says follows its data, and the opposite data give the opposite sentence."""

import copy
from typing import Any

import pytest
from support.knn.files import GATE_CURVE, TUNED_CACHE, TUNED_KNN, TUNED_LM

from distlm.analysis import sentences
from distlm.knnlm.tune.records import GateCurve, Tuned
from distlm.runtime.files import write_json


def test_training() -> None:
    falling, rising = [(10, 5.0), (20, 4.0), (30, 3.5)], [(10, 5.0), (20, 3.0), (30, 3.5)]
    assert sentences.of_training([], falling).endswith("lowest at its last measurement, 3.50 at update 30.")
    assert sentences.of_training([], rising).endswith("lowest at update 20 (3.00) and higher at the end (3.50).")
    assert sentences.of_training([], falling[:1]) == "The loss on valid is 5.00 at update 10."
    assert sentences.of_training(falling, []) == "The training loss goes from 5.00 (update 10) to 3.50 (update 30)."


def test_learning_rate_and_memory_use() -> None:
    assert "highest at update 2 (0.5) and 0.1 at update 3" in sentences.of_learning_rate([(1, 0.2), (2, 0.5), (3, 0.1)])
    assert sentences.of_learning_rate([(1, 0.2), (2, 0.2)]) == "The rate is 0.2 throughout."
    use = {"layer 2": [(1, 0.25), (2, 0.5)], "layer 4": [(1, 0.5), (2, 0.25)]}
    said = sentences.of_memory_use(use)
    assert "layer 2: 50%, up from 25%" in said and "layer 4: 25%, down from 50%" in said


def tuned(tmp_path: Any, **changes: Any) -> Tuned:
    tree = copy.deepcopy({**TUNED_KNN, **TUNED_LM, "cache": TUNED_CACHE})
    write_json(tmp_path / "knn.json", tree | changes)
    return Tuned.read(tmp_path / "knn.json")


def test_the_weight_of_the_neighbours(tmp_path: Any) -> None:
    assert sentences.of_weight(tuned(tmp_path)) == "λ = 0.25, T = 4 give 16.06 instead of the LM's 17.96, 10.6% less."
    for useless in ({"lambda": 0.0, "perplexity": 17.96}, {"perplexity": 18.2}):
        said = sentences.of_weight(tuned(tmp_path, **useless))
        assert said == "Neighbours do not help on valid: no λ above 0 is better than the LM's 17.96."
    edge = "the best temperature=4 is the largest of knn.temperatures; add larger ones"
    assert sentences.of_weight(tuned(tmp_path, edges=[edge])).endswith(f" T{edge[1:]}.")


def test_the_number_of_neighbours(tmp_path: Any) -> None:
    said = sentences.of_k(tuned(tmp_path))
    assert said == "More neighbours help: 17.29 with 4, 16.05 with 16, the most that were tried."
    grid = copy.deepcopy(TUNED_KNN["grid"])
    grid["loss_nats"] = grid["loss_nats"][::-1]
    said = sentences.of_k(tuned(tmp_path, grid=grid))
    assert said == "4 neighbours are best (16.05); the 16 that were tried at most give 17.29."


def test_the_cache(tmp_path: Any) -> None:
    said = sentences.of_theta(tuned(tmp_path))
    assert said.startswith(
        "θ = 0.6 with a window of 2000 gives 14.90 instead of the LM's 17.96, 17.0% less. The best θ"
    )
    said = sentences.of_theta(tuned(tmp_path, cache={**TUNED_CACHE, "perplexity": 17.96, "lambda": 0.0, "edges": []}))
    assert said == "The cache does not help on valid: the LM alone has 17.96."


@pytest.mark.parametrize(("loss", "points"), [(2.8, "1 of 1 points"), (2.88, "0 of 1 points")])
def test_skipped_searches(loss: float, points: str) -> None:
    curve = GateCurve(**{**GATE_CURVE, "loss_nats": [2.77, loss, 2.9], "perplexity": [15.96, 2.718281828**loss, 18.17]})
    said = sentences.of_skips({"test": curve})
    assert points in said and "with 49% skipped, 17.01 with as many skipped at random and 15.96 with none;" in said
    none = GateCurve(**{**GATE_CURVE, "skipped": [0.0, 0.0, 1.0]})
    assert sentences.of_skips({"test": none}) == "The gate skips all searches or none."


def test_recall() -> None:
    said = sentences.of_recall({"a": [(0.5, 17.0), (0.9, 16.0)]}, "test")
    assert said == "The highest recall, 0.900, has the lowest perplexity on test, 16.00; the lowest, 0.500, has 17.00."
    said = sentences.of_recall({"a": [(0.5, 16.0)], "b": [(0.9, 17.0)]}, "test")
    assert said.endswith("16.00, is had at recall 0.500; the highest recall, 0.900, has 17.00.")


def test_time_and_ends() -> None:
    assert sentences.of_time({"train": 30.0, "search": 90.0}) == "search takes most: 75% of 2m00s."
    assert sentences.lowest_and_highest({"a": 9.0, "b": 8.0}, "It") == (
        "It ends lowest for b (8.00) and highest for a (9.00).")  # fmt: skip
    assert sentences.lowest_and_highest({"a": 9.0, "b": 9.0}, "It") == "It is 9.00 at the end of every line."
