import numpy as np
import pytest

from distlm.data.shards.records import Tokenizer
from distlm.models.plm.text.masking import NO_LABEL, mask_rows

PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103
BERT = Tokenizer(30522, "hash", True, PAD, UNK, CLS, SEP, MASK)
TINY = Tokenizer(12, "hash", True, 0, 1, 2, 3, 4)


def some_rows(count: int, length: int = 128, tokenizer: Tokenizer = BERT) -> np.ndarray:
    random = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(tokenizer.vocabulary), tokenizer.special_ids)
    tokens = random.choice(ordinary, (count, length)).astype(np.int32)
    tokens[:, 0], tokens[:, -1], tokens[::3, length // 2] = tokenizer.cls, tokenizer.sep, tokenizer.unk
    tokens[1::4, -9:] = tokenizer.pad
    return tokens


def test_shares_are_fifteen_percent_and_eighty_ten_ten() -> None:
    tokens = some_rows(4000)
    inputs, labels = mask_rows(tokens, np.arange(4000), 0, 1, BERT)
    assert inputs.dtype == labels.dtype == np.int64 and inputs.shape == labels.shape == tokens.shape
    ordinary = ~np.isin(tokens, BERT.special_ids)
    chosen, n = labels != NO_LABEL, int(ordinary.sum())
    assert abs(chosen.sum() - 0.15 * n) < 4 * np.sqrt(n * 0.15 * 0.85)
    assert np.array_equal(labels[chosen], tokens[chosen])
    assert np.array_equal(inputs[~chosen], tokens[~chosen])
    m = int(chosen.sum())
    masked, kept = inputs[chosen] == MASK, inputs[chosen] == tokens[chosen]
    for share, found in ((0.8, masked.sum()), (0.1, kept.sum()), (0.1, m - masked.sum() - kept.sum())):
        assert abs(found - share * m) < 4 * np.sqrt(m * share * (1 - share)) + 10, share


def test_special_tokens_and_padding_are_never_chosen_nor_drawn() -> None:
    tokens = some_rows(2000, 64, TINY)
    inputs, labels = mask_rows(tokens, np.arange(2000), 3, 1, TINY, share=0.6)
    special = np.isin(tokens, TINY.special_ids)
    assert (labels[special] == NO_LABEL).all() and np.array_equal(inputs[special], tokens[special])
    drawn = inputs[(labels != NO_LABEL) & (inputs != TINY.mask) & (inputs != tokens)]
    counts = np.bincount(drawn, minlength=12)
    assert (counts[list(TINY.special_ids)] == 0).all()
    # Seven ordinary pieces, equally likely; one in seven drawings gives the token itself and counts as kept.
    assert len(drawn) > 5000 and (abs(counts[5:] / len(drawn) - 1 / 7) < 0.02).all()


def test_a_row_is_masked_alike_alone_and_in_any_company() -> None:
    tokens, rows, epochs = some_rows(40), np.arange(40) * 977, np.arange(40) % 3
    inputs, labels = mask_rows(tokens, rows, epochs, 5, BERT)
    order = np.random.default_rng(1).permutation(40)
    shuffled = mask_rows(tokens[order], rows[order], epochs[order], 5, BERT)
    for left, right in zip(shuffled, (inputs, labels), strict=True):
        assert np.array_equal(left, right[order])
    for number in (0, 7, 39):
        alone = mask_rows(tokens[number : number + 1].astype(np.uint16), [rows[number]], int(epochs[number]), 5, BERT)
        assert np.array_equal(alone[0][0], inputs[number]) and np.array_equal(alone[1][0], labels[number])


def test_shorter_rows_have_the_same_masks_at_the_same_places() -> None:
    tokens = some_rows(40)
    whole, short = (mask_rows(part, np.arange(40), 0, 1, BERT)[1] for part in (tokens, tokens[:, :50]))
    assert np.array_equal(whole[:, :50], short)


def test_masks_of_other_rows_epochs_and_seeds_are_independent() -> None:
    """The share of places chosen by both is 0.15², also for numbers that differ in one bit or by a swap."""
    tokens = np.full((300, 128), 5000)

    def chosen(rows: np.ndarray, epoch: int, seed: int) -> np.ndarray:
        return mask_rows(tokens, rows, epoch, seed, BERT)[1] != NO_LABEL

    base = chosen(np.arange(300), 0, 0)
    n = base.size
    for other in (
        chosen(np.arange(300), 1, 0), chosen(np.arange(300), 0, 1), chosen(np.arange(300), -1, 0),
        chosen(np.arange(300) + 300, 0, 0), chosen(np.arange(300) + 2**40, 0, 0), chosen(np.arange(300), 0, 2**63),
        np.roll(base, 1, axis=0), np.roll(base, 1, axis=1), np.roll(base, 64, axis=1),
    ):  # fmt: skip
        assert abs((base & other).sum() / n - 0.15**2) < 4 * np.sqrt(0.15**2 / n)
    # A row numbered like another's epoch.
    assert not np.array_equal(chosen(np.full(300, 7), 3, 0), chosen(np.full(300, 3), 7, 0))


def test_every_place_of_a_row_is_equally_likely() -> None:
    labels = mask_rows(np.full((20000, 16), 5000), np.arange(20000), 0, 2, BERT)[1]
    shares = (labels != NO_LABEL).mean(axis=0)
    assert (abs(shares - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 20000)).all()


def test_numbers_per_row_are_binomial() -> None:
    counts = (mask_rows(np.full((20000, 40), 5000), np.arange(20000), 0, 2, BERT)[1] != NO_LABEL).sum(axis=1)
    assert abs(counts.mean() - 6) < 0.1 and abs(counts.var() - 40 * 0.15 * 0.85) < 0.3


def splitmix(word: int) -> int:
    """One step of SplitMix64, in plain integers."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_masks_are_pinned() -> None:
    """Other masks would break the resuming of runs started before. 0xE220A8397B1DCDAF is SplitMix64's first number."""
    assert splitmix(0) == 0xE220A8397B1DCDAF
    seed, epoch, row = 7, 6, 12345
    key = splitmix(splitmix(splitmix(seed) ^ epoch) ^ row)
    expected = []
    for place in range(40):
        step = (place + 1) * 0x9E3779B97F4A7C15
        if splitmix(splitmix(key ^ 0x6A09E667F3BCC908) + step) >= 0.3 * 2**64:
            continue
        word = splitmix(splitmix(key ^ 0xBB67AE8584CAA73B) + step)
        drawn = (word % 2**32) * (30522 - 5) >> 32
        # Ordinary ids are 1 to 99 and 104 on.
        drawn += 1 if drawn < 99 else 5
        action = (word >> 32) / 2**32
        expected.append((place, MASK if action < 0.8 else drawn if action < 0.9 else 1000 + place))
    inputs, labels = mask_rows(np.arange(1000, 1040)[None], [row], epoch, seed, BERT, share=0.3)
    places = np.flatnonzero(labels[0] != NO_LABEL)
    assert list(zip(places.tolist(), inputs[0, places].tolist(), strict=True)) == expected
    assert len({id for _, id in expected}) > 2, "the example has replaced and kept tokens"


def test_a_share_must_be_a_share() -> None:
    for share in (0.0, 1.0, 15.0):
        with pytest.raises(ValueError):
            mask_rows(some_rows(2), [0, 1], 0, 1, BERT, share=share)
