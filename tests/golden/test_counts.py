"""Counts that the field agrees on, from the real WikiText-2."""

from pathlib import Path

import numpy as np
import pytest
from support.present import present

from distlm.config import DataConfig, RunConfig
from distlm.data.blocks import eval_blocks
from distlm.data.prepare import PrepareSummary, run_prepare
from distlm.data.tokens import TokenFiles
from distlm.runtime.ranks.world import World
from distlm.runtime.stage import open_stage

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def prepared(wikitext2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PrepareSummary, TokenFiles]:
    run_dir = tmp_path_factory.mktemp("wikitext2")
    config = RunConfig(run_dir=str(run_dir), data=DataConfig(source="folder", text_dir=str(wikitext2)))
    with open_stage("prepare", config, World(0, 1, 0, 1, "here", "single")) as stage:
        summary = run_prepare(stage)
    return summary, TokenFiles.open(Path(summary["folder"]))


def test_token_line_and_vocabulary_counts(prepared: tuple[PrepareSummary, TokenFiles]) -> None:
    summary, tokens = prepared
    assert summary["tokens"] == {"train": 2_088_628, "valid": 217_646, "test": 245_569}
    assert {split: facts.lines for split, facts in tokens.meta.splits.items()} == {
        "train": 36_718, "valid": 3_760, "test": 4_358,
    }  # fmt: skip
    assert tokens.meta.types == 33_278
    assert len(tokens.dictionary) == 33_280
    assert not [word for word in tokens.dictionary.words if word.startswith("madeupword")]
    assert tokens.dictionary.words[4:10] == ["the", ",", ".", "of", "and", "in"]


def test_unknown_words_are_those_of_the_text_alone(
    prepared: tuple[PrepareSummary, TokenFiles], wikitext2: Path
) -> None:
    _, tokens = prepared
    for split in ("train", "valid", "test"):
        written = (wikitext2 / f"{split}.txt").read_text("utf-8").split().count("<unk>")
        assert tokens.meta.splits[split].unk == written > 0


def test_edition_is_recognised_by_hash(prepared: tuple[PrepareSummary, TokenFiles]) -> None:
    summary, tokens = prepared
    assert summary["edition"] == "WikiText-2"
    assert present(tokens.meta.edition).compared == ["token counts", "vocabulary", "sha256"]


@pytest.mark.parametrize(("split", "blocks"), [("valid", 503), ("test", 569)])
def test_evaluation_blocks_of_the_published_setting(
    prepared: tuple[PrepareSummary, TokenFiles], split: str, blocks: int
) -> None:
    # WikiText-2 and WikiText-103 have the same valid and test lines up to <unk>: the counts are those of both.
    ids = prepared[1].split(split)
    plan = eval_blocks(ids, context_window=2560, block=512)
    assert len(plan) == blocks
    assert plan.scored.max() <= 512 and round(plan.scored.mean()) in (432, 433)
    assert plan.scored.sum() == len(ids)
    assert np.array_equal(plan.start[1:], plan.end[:-1])
    assert (ids[plan.end - 1] == 2).all(), "no line is cut"
