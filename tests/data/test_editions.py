import pytest

from distlm.data.editions import EDITIONS, recognise

WT2, WT103, PTB = EDITIONS
HASHES = dict(zip(("train", "valid", "test"), WT2.sha256 or (), strict=True))


def counts(train: int, valid: int, test: int) -> dict[str, int]:
    return {"train": train, "valid": valid, "test": test}


@pytest.mark.parametrize("edition", EDITIONS, ids=lambda edition: edition.name)
def test_exact_counts_are_recognised(edition: object) -> None:
    match = recognise(counts(*edition.tokens), edition.types, None)  # type: ignore[attr-defined]
    assert match is not None and match.exact
    assert match.name == edition.name  # type: ignore[attr-defined]
    assert match.line().startswith("recognised")


def test_wikitext2_with_its_hashes_says_that_they_were_compared() -> None:
    match = recognise(counts(*WT2.tokens), WT2.types, HASHES)
    assert match is not None and match.exact and match.compared == ["token counts", "vocabulary", "sha256"]


def test_equal_counts_and_another_hash_is_a_near_miss_that_names_the_file() -> None:
    match = recognise(counts(*WT2.tokens), WT2.types, {**HASHES, "valid": "0" * 64})
    assert match is not None and not match.exact
    assert len(match.differences) == 1
    assert match.differences[0].startswith(f"valid has sha256 {'0' * 64}, WikiText-2 f0737ed")
    assert match.line().startswith("WARNING: nearly WikiText-2")


def test_one_equal_split_is_a_near_miss_with_the_missing_tokens_counted() -> None:
    # The counts of WikiText-103 without a </s> for blank lines in train.
    match = recognise(counts(103_227_021 - 636_000, 217_646, 245_569), WT103.types, None)
    assert match is not None and match.name == "WikiText-103"
    assert match.differences == ["train has 102,591,021 tokens, WikiText-103 103,227,021 (-636,000)"]


def test_counts_within_two_percent_are_a_near_miss_and_beyond_are_nothing() -> None:
    match = recognise(counts(*(round(count * 1.015) for count in PTB.tokens)), 10_000, None)
    assert match is not None and match.name == "Penn Treebank" and len(match.differences) == 3
    assert recognise(counts(*(round(count * 1.03) for count in PTB.tokens)), 10_000, None) is None


def test_another_vocabulary_is_named() -> None:
    match = recognise(counts(*WT2.tokens), 76_617, None)
    assert match is not None
    assert match.differences == ["train has 76,617 distinct words, WikiText-2 33,278"]


def test_wikitext103_wins_over_wikitext2_whose_other_splits_count_the_same() -> None:
    match = recognise(counts(*WT103.tokens), WT103.types, None)
    assert match is not None and match.name == "WikiText-103" and match.exact


def test_other_text_is_no_edition() -> None:
    assert recognise(counts(1000, 100, 100), 50, None) is None
