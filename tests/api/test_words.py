"""Ids and words, in both directions."""

from pathlib import Path

import numpy as np
import pytest

import distlm
from distlm.config.schema import RunConfig


def test_a_split_is_encoded_as_data_prepare_did_and_decoded_again(causal: RunConfig) -> None:
    run, text = distlm.open_run(causal.run_dir), (Path(causal.data.text_dir) / "valid.txt").read_text("utf-8")
    ids = run.words.encode(text)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, run.tokens("valid"))
    assert run.words.decode(ids) == text


def test_a_text_ends_where_it_ends(causal: RunConfig) -> None:
    words = distlm.open_run(causal.run_dir).words
    assert len(words.encode("")) == 0
    assert words.encode("\n").tolist() == [words.id_of("</s>")]
    whole, half = words.encode("w1 w2\nw3\n").tolist(), words.encode("w1 w2\nw3").tolist()
    assert whole == [*half, words.id_of("</s>")]


def test_words_by_id_and_ids_by_word(transformer_lm: RunConfig) -> None:
    words = distlm.open_run(transformer_lm.run_dir).words
    assert words[0] == "<s>" and words[[2, 3]] == ["</s>", "<unk>"] and len(words) % 8 == 0
    assert "w1" in words and words[words.id_of("w1")] == "w1"
    assert "nosuchword" not in words and words.id_of("nosuchword") == words.encode("nosuchword")[0] == 3
    for wrong in (-1, len(words)):
        with pytest.raises(IndexError, match=f"id {wrong}: ids are 0 to"):
            words[wrong]


def test_sub_words_are_shown_as_text(hf: RunConfig) -> None:
    words = distlm.open_run(hf.run_dir).words
    ids = words.encode(" w1 w23").tolist()
    assert words.decode(ids) == " w1 w23" and "".join(words[ids]).replace("·", "") == "w1w23"
    assert [words.names[i][0] for i in ids].count("Ġ") == 2
