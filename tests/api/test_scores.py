"""What open_run computes is what the commands have written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.hf.runs import made_run
from support.knn import copy_run, in_stage

import distlm
from distlm.config.schema import RunConfig
from distlm.data.subwords import FIRST_PIECE
from distlm.errors import DistlmError, UsageError
from distlm.index import SearchIndex
from distlm.integrations.reading import of_run
from distlm.knnlm.evaluate.losses import Losses
from distlm.knnlm.generate.stage import run_generate
from distlm.knnlm.generate.words import Sampling
from distlm.knnlm.search.stage import run_search
from distlm.knnlm.tune.records import Tuned
from distlm.knnlm.tune.stage import run_tune
from distlm.runtime.rundir import RunDir

GREEDY = Sampling(tokens=6, greedy=True, seed=1, top_p=1.0, shown=0, context=0)


def test_log_probs_of_a_split_are_those_of_the_evaluation(causal: RunConfig) -> None:
    run, text = distlm.open_run(causal.run_dir), Path(causal.data.text_dir) / "test.txt"
    found = run.log_probs(text.read_text("utf-8"))
    np.testing.assert_array_equal(found.ids, run.tokens("test"))
    losses = RunDir.of(causal).losses
    np.testing.assert_array_equal(found.lm, -Losses.open(losses, "test", "lm").nats)
    assert found.mixed is not None and found.knn is not None and np.isfinite(found.knn).any()
    # Untrained states lie so near each other that rounding decides, now and then, which is the k-th of the candidates.
    same = np.isclose(found.mixed, -Losses.open(losses, "test", "knn").nats, atol=1e-5)
    assert same.mean() > 0.98
    alone = run.log_probs(run.tokens("test"), knn=False)
    np.testing.assert_array_equal(alone.lm, found.lm)
    assert alone.knn is None and alone.mixed is None


def test_capped_logits_and_a_token_in_front(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Gemma 2: the numbers of the evaluation, and by transformers alone those of a text as its tokenizer begins it."""
    made = made_run(tmp_path_factory, "gemma2")
    run = distlm.open_run(made.run.root)
    found = run.log_probs(made.split("valid"))
    assert found.mixed is not None
    np.testing.assert_array_equal(found.lm, -Losses.open(made.run.losses, "valid", "lm").nats)
    np.testing.assert_allclose(found.mixed, -Losses.open(made.run.losses, "valid", "knn").nats, atol=1e-5)
    with torch.inference_mode():
        own = made.model()(**made.tokenizer()("w1 w2", return_tensors="pt")).logits[0, -1].double().softmax(0)
    for word in run.next_word("w1 w2", top=5, knn=False):
        assert word.p == pytest.approx(float(own[word.id - FIRST_PIECE]), rel=1e-4)


def test_given_settings_replace_the_tuned_ones(transformer_lm: RunConfig) -> None:
    run, ids = distlm.open_run(transformer_lm.run_dir), distlm.open_run(transformer_lm.run_dir).tokens("test")[:90]
    tuned = Tuned.read(RunDir.of(transformer_lm).tuned)
    as_tuned = run.log_probs(ids)
    same = run.log_probs(ids, lam=tuned.weight, temperature=tuned.temperature, k=tuned.k)  # type: ignore[arg-type]
    np.testing.assert_array_equal(same.mixed, as_tuned.mixed)
    np.testing.assert_array_equal(run.log_probs(ids, lam=0.0).mixed, as_tuned.lm)
    other = run.log_probs(ids, lam=0.5, temperature=1e6, k=16)
    assert other.knn is not None and other.mixed is not None
    # Every neighbour weighs the same, so a share of 16.
    share = np.exp(other.knn) * 16
    np.testing.assert_allclose(share, share.round(), atol=1e-3)
    np.testing.assert_allclose(np.exp(other.mixed), 0.5 * np.exp(other.lm) + 0.5 * np.exp(other.knn), rtol=1e-12)


@pytest.mark.parametrize("knn", [True, False])
def test_next_words_are_those_that_generate_draws_from(causal: RunConfig, knn: bool) -> None:
    run = distlm.open_run(causal.run_dir)
    prompt = "w1 w2" if causal.model.kind != "hf" else ""
    made = in_stage("knn", causal, lambda stage: run_generate(stage, prompt, GREEDY, not knn))
    ids = run.words.encode(prompt).tolist()
    for drawn in made.mixed if knn else made.alone:
        first, *_ = all_words = run.next_word(ids, top=len(run.words), knn=knn)
        assert (first.word, first.p, first.lm, first.knn) == (drawn.word, drawn.p, drawn.p_lm, drawn.p_knn)
        assert [word.p for word in all_words] == sorted((word.p for word in all_words), reverse=True)
        possible = [word.id for word in all_words]
        assert len(set(possible)) == len(possible) < len(run.words) and not {0, 1} & {*possible}
        # A model of random weights likes words that no text holds, too.
        assert 0.1 < sum(word.p for word in all_words) <= 1 + 1e-6
        ids.append(first.id)


def test_the_contexts_behind_a_word_are_of_the_training_text(transformer_lm: RunConfig) -> None:
    run = distlm.open_run(transformer_lm.run_dir)
    train, found = run.tokens("train"), run.next_word("w1 w2\nw3", top=5, contexts=100, context=4)
    assert len(found) == 5
    for word in found:
        assert [near.distance for near in word.contexts] == sorted(near.distance for near in word.contexts)
        assert sum(near.weight for near in word.contexts) == pytest.approx(word.knn or 0.0, rel=1e-9)
        for near in word.contexts:
            assert near.word == word.word == run.words[int(train[near.token])]
            assert near.context == run.words.decode(train[near.token - 4 : near.token]).replace("\n", " </s> ").strip()
            keys, value = run.datastore[near.row]
            assert value == word.id and near.distance >= 0 and keys.shape == (run.datastore.width,)
    assert max(len(word.contexts) for word in run.next_word("w1 w2\nw3", contexts=2)) == 2


def test_dot_products_weigh_as_the_evaluation_weighs_them(transformer_lm: RunConfig, tmp_path: Path) -> None:
    config = copy_run(transformer_lm, tmp_path / "run", "knn.similarity=dot")
    for function in (run_search, run_tune):
        in_stage("knn", config, function)
    run = distlm.open_run(config.run_dir)
    assert run.config.knn.similarity == "dot"
    unit = next(iter(run.neighbours("test").units()))
    # The first tokens of the split have the same context there and here.
    found = run.log_probs(run.tokens("test")[:30], lam=1.0, temperature=4.0, k=16)
    weights = np.exp(-unit.distances[:30].astype(float) / 4.0) * (unit.values[:30] >= 0)
    hits = (weights * (unit.values[:30] == unit.targets[:30, None])).sum(1) / weights.sum(1)
    assert found.mixed is not None
    np.testing.assert_allclose(np.exp(found.mixed), hits, atol=1e-5)
    after = {word.id: word.knn for word in run.next_word(run.tokens("test")[:20], top=99, temperature=4.0, k=16)}
    assert after[int(unit.targets[20])] == pytest.approx(hits[20], abs=1e-5)


def test_where_no_neighbour_is_found(transformer_lm: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure of one token keeps λ, as the evaluation does; a distribution over all words still sums to 1."""

    def nothing(self: SearchIndex, queries: np.ndarray, k: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.inf, np.float32)

    monkeypatch.setattr(SearchIndex, "search", nothing)
    run, scorer = distlm.open_run(transformer_lm.run_dir), of_run(transformer_lm.run_dir).scorer
    ids, lam = run.tokens("test")[:20], scorer.mixing.lam
    assert lam > 0
    found, tokens = run.log_probs(ids), scorer.tokens(ids, 16, 16, 4)
    assert found.mixed is not None
    for lm, mixed in ((found.lm, found.mixed), (tokens.lm, tokens.mixture)):
        np.testing.assert_allclose(mixed, lm + np.log1p(-lam))
    every = run.next_word(ids, top=len(run.words))
    assert all(word.p == word.lm and word.knn is None and not word.contexts for word in every)
    after = scorer.next_word(ids).double().exp()
    assert float(after.sum()) == pytest.approx(1, abs=1e-5)
    assert scorer.continuations([(ids, ids[:1])])[0][0] == pytest.approx(float(after[ids[0]].log()), abs=1e-4)
    assert float(after[every[0].id]) == pytest.approx(every[0].lm, rel=1e-4)


def test_fewer_than_one_neighbour_is_refused(transformer_lm: RunConfig) -> None:
    """Where more candidates are looked at, too."""
    run = distlm.open_run(transformer_lm.run_dir, "knn.candidates=32")
    for k in (0, -1):
        with pytest.raises(DistlmError, match=f"k={k}: must be at least 1"):
            run.index.search(np.asarray(run.datastore[:2].keys), k=k)


@pytest.mark.parametrize("wrong, message", [
    ({"lam": 1.5}, r"lam=1\.5: must be in \[0, 1\]"), ({"temperature": 0.0}, r"temperature=0\.0: must be above 0"),
    ({"k": 0}, "k=0: must be at least 1"),
])  # fmt: skip
def test_impossible_settings_are_refused(transformer_lm: RunConfig, wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        distlm.open_run(transformer_lm.run_dir).log_probs("w1", **wrong)  # type: ignore[arg-type]


def test_impossible_texts_are_refused(transformer_lm: RunConfig) -> None:
    run = distlm.open_run(transformer_lm.run_dir)
    with pytest.raises(UsageError, match="no tokens to score"):
        run.log_probs("")
    with pytest.raises(UsageError, match="ids 3 to 9999: ids are 0 to"):
        run.log_probs([3, 9999])
    with pytest.raises(UsageError, match="a string or the ids of one"):
        run.next_word(np.zeros((2, 2)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="top=0: must be at least 1"):
        run.next_word("w1", top=0)
