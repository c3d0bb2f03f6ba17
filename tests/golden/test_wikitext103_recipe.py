"""The recipe `wikitext103` against published and computed values (fairseq's transformer_lm_wiki103, the kNN-LM paper).

tests/golden/test_counts.py checks the evaluation blocks, which are WikiText-2's too, on the real text.
"""

import math

import pytest
from support.config import run_of

from distlm.config import load_config
from distlm.data.blocks import store_blocks, training_blocks
from distlm.data.order import rows_for_update
from distlm.datastore.plan import plan_store
from distlm.index.choose.auto import resolve
from distlm.index.factory import fit_factory
from distlm.index.search.candidates import candidates_of
from distlm.models.described import model_of, parameter_count
from distlm.models.transformer.config import TransformerRun
from distlm.optim.schedule import learning_rate

TOKENS, VOCABULARY = 103_227_021, 267_744
RECIPE = run_of(TransformerRun, load_config("wikitext103"))


def test_parameters() -> None:
    assert parameter_count(model_of(RECIPE), VOCABULARY) == 246_933_504


def test_learning_rates() -> None:
    golden = {0: 1e-7, 8000: 0.50000005, 16000: 1.0, 50000: 0.961385, 151000: 0.50005, 285999: 1.000e-4, 286000: 0.75}
    for update, rate in golden.items():
        assert learning_rate(RECIPE.train, update) == pytest.approx(rate, rel=1e-6), update
    assert RECIPE.train.updates == 286_000, "the cosine restarts there"


def test_learning_rates_by_fairseqs_formula() -> None:
    """Its cycles have a closed form: i = ⌊log_t(1 − u / P · (1 − t))⌋."""
    low, high, period, longer, shrink = 1e-4, 1.0, 270_000, 2.0, 0.75
    for update in (16_000, 77_777, 285_999, 286_000, 500_000, 825_999, 826_001):
        after = update - 16_000
        cycle = math.floor(math.log(1 - after / period * (1 - longer), longer))
        length = period * longer**cycle
        position = after - (1 - longer**cycle) / (1 - longer) * period
        peak, floor = high * shrink**cycle, low * shrink**cycle
        rate = floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * position / length))
        assert learning_rate(RECIPE.train, update) == pytest.approx(rate, rel=1e-9), update


def test_updates_and_epochs() -> None:
    train = RECIPE.train
    blocks = training_blocks(TOKENS, train.tokens_per_sample)
    assert len(blocks) == 33_603 and blocks.scored[-1] == TOKENS - 33_602 * 3072
    assert train.tokens_per_sample * train.blocks_per_update == 73_728
    assert round(len(blocks) / train.blocks_per_update) == 1_400 == train.valid_every == train.save_every
    assert round(train.updates * train.blocks_per_update / len(blocks)) == 204
    # Update 1,400 is the first that takes blocks of two epochs: 1,400 × 24 are three blocks short of one.
    first = {int(row) for update in range(1_400) for row in rows_for_update(train.seed, update, 24, len(blocks))}
    assert len(first) == 33_600
    assert first | {int(row) for row in rows_for_update(train.seed, 1_400, 24, len(blocks))[:3]} == {*range(33_603)}


def test_keys_blocks_and_sizes() -> None:
    store = RECIPE.datastore
    plan = plan_store(TOKENS, store.context_window, store.block, store.batch_blocks, store.rows_per_shard,
                      RECIPE.model.max_positions)  # fmt: skip
    assert plan.rows == TOKENS - 1_536 == 103_225_485
    # fairseq counts the first block too, which it then drops; the last one has 141 tokens.
    assert len(plan.blocks) + 1 == 67_206 and plan.blocks.scored[-1] == 141
    lengths = plan.blocks.lengths
    assert lengths[:-1].min() == lengths.max() == 3_072, "1,536 to 3,071 tokens before each stored one"
    keys = plan.rows * RECIPE.model.width
    assert [round(keys * item / 1e9, 1) for item in (4, 2)] == [422.8, 211.4]
    # Window 2,560 is TRIME's.
    assert int(store_blocks(TOKENS, 2_560, 512).scored.sum()) == 103_224_461


def test_search_and_evaluation_settings() -> None:
    knn = load_config("wikitext103-paper").knn
    assert (knn.k, knn.nprobe, knn.context_window, knn.block) == (1024, 32, 2560, 512)
    assert knn.context_window + knn.block == RECIPE.model.max_positions
    assert (knn.distances, knn.similarity, RECIPE.datastore.tap) == ("exact", "l2", "last_ffn_input")
    assert 0.25 in knn.lambdas and 1.0 in knn.temperatures, "the paper's settings are in the grid"
    assert load_config("wikitext103-paper").index.factory == "IVF4096,PQ64"
    assert candidates_of(knn, 103_225_485, coarse=True) == 1024, "no more than k"
    # 64 bytes of code and 8 of id for each key.
    assert round(72 * 103_225_485 / 1e9, 2) == 7.43


def test_the_index_of_our_own_has_the_papers_bytes_and_reads_as_many_keys() -> None:
    own, paper = (load_config(name) for name in ("wikitext103", "wikitext103-paper"))
    differing = {key for key in ("data", "model", "train", "datastore") if getattr(own, key) != getattr(paper, key)}
    assert not differing
    chosen = resolve(own.index, 103_225_485, 1024)
    factories = [fit_factory(text, 1024, 103_225_485, 1 << 20) for text in (chosen.factory, paper.index.factory)]
    assert chosen.factory == "PCAR448,IVF16384,RaBitQ"
    assert [factory.key_bytes for factory in factories] == [72, 72]
    assert own.knn.nprobe / factories[0].nlist == paper.knn.nprobe / factories[1].nlist
