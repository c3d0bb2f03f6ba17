"""The field's corpora, recognised by counts, vocabulary and hashes, so that a wrong copy is noticed before training."""

from collections.abc import Mapping
from dataclasses import dataclass

from distlm.data.records import EditionMatch
from distlm.data.tokens import SPLITS


@dataclass(frozen=True)
class Edition:
    """What a published corpus must give. `tokens` count one </s> per line; `types` count <unk> and </s>."""

    name: str
    tokens: tuple[int, int, int]
    """train, valid, test."""
    types: int
    """Distinct words of train, <unk> and </s> included."""
    sha256: tuple[str, str, str] | None = None
    """Of the raw files, where known."""


EDITIONS: tuple[Edition, ...] = (
    Edition(
        "WikiText-2",
        (2_088_628, 217_646, 245_569),
        33_278,
        (
            "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        ),
    ),
    # 267,735 types are 267,733 words: with four specials, padded to a multiple of 8, fairseq's 267,744 entries.
    Edition("WikiText-103", (103_227_021, 217_646, 245_569), 267_735),
    Edition("Penn Treebank", (929_589, 73_760, 82_430), 10_000),
)
NEAR = 0.02
"""Counts within this fraction of an edition's are a near miss."""


def recognise(tokens: Mapping[str, int], types: int, sha256: Mapping[str, str] | None) -> EditionMatch | None:
    """The edition that a corpus is or nearly is, or None.

    `tokens` per split, `types` as in `Edition`, `sha256` of each split's raw file or None when there are no files.
    Nearly: one split has an edition's count, or all are within 2 % of it.
    """
    near = [(edition, _match(edition, tokens, types, sha256)) for edition in EDITIONS if _is_near(edition, tokens)]
    if not near:
        return None
    # Editions share splits (WikiText-2 and -103): the one with the nearest train split is meant.
    return min(near, key=lambda item: (not item[1].exact, abs(tokens["train"] / item[0].tokens[0] - 1)))[1]


def _is_near(edition: Edition, tokens: Mapping[str, int]) -> bool:
    pairs = [(tokens[split], expected) for split, expected in zip(SPLITS, edition.tokens, strict=True)]
    return any(ours == theirs for ours, theirs in pairs) or all(abs(a - b) <= NEAR * b for a, b in pairs)


def _match(edition: Edition, tokens: Mapping[str, int], types: int, sha256: Mapping[str, str] | None) -> EditionMatch:
    compared, differences = ["token counts", "vocabulary"], []
    for split, expected in zip(SPLITS, edition.tokens, strict=True):
        if tokens[split] != expected:
            differences.append(
                f"{split} has {tokens[split]:,} tokens, {edition.name} {expected:,} ({tokens[split] - expected:+,})"
            )
    if types != edition.types:
        differences.append(f"train has {types:,} distinct words, {edition.name} {edition.types:,}")
    if edition.sha256 is not None and sha256 is not None:
        compared.append("sha256")
        for split, digest in zip(SPLITS, edition.sha256, strict=True):
            if sha256[split] != digest:
                differences.append(f"{split} has sha256 {sha256[split]}, {edition.name} {digest}")
    return EditionMatch(edition.name, compared, differences, exact=not differences)
