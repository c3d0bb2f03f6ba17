"""Generation: its probabilities are the evaluation's, its contexts are the training text's, its page shows them."""

import math
import re
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from support import write_text
from support.knn import copy_run, in_stage
from support.records import alter
from support.store import arguments, tiny_config

import distlm
from distlm.analysis.generation import HEADS, TERMS, share_of_neighbours, write_page
from distlm.cli import main
from distlm.data.prepare import run_prepare
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, UsageError
from distlm.knnlm.evaluate.losses import Losses
from distlm.knnlm.evaluate.parts import read_frozen
from distlm.knnlm.generate.stage import Generation, generation_text, run_generate
from distlm.knnlm.generate.words import Found, Generator, Sampling, choose
from distlm.knnlm.search.source import open_source
from distlm.knnlm.tune.records import Tuned
from distlm.runtime.rundir import RunDir

DRAWN = Sampling(tokens=12, greedy=False, seed=3, top_p=1.0, shown=4, context=6)


def generate(config, prompt="w1 w2", sampling=DRAWN, lm_only=False) -> Generation:
    return in_stage("knn", config, lambda stage: run_generate(stage, prompt, sampling, lm_only))


@pytest.fixture(scope="module")
def made(searched) -> Generation:
    return generate(searched)


def test_the_next_word_has_the_probability_of_the_evaluation(searched):
    """Within the first block of a split the context is the same: every token's p_LM and mixture must be, too."""
    run = RunDir(Path(searched.run_dir))
    ids = TokenFiles.open(run.tokens(searched)).split("test").tolist()
    tuned = Tuned.read(run.tuned)

    def probabilities(stage):
        generator = Generator(open_source(stage), read_frozen(tuned))
        steps = [generator.next_word(ids[:place]) for place in range(20)]
        for step in steps:
            assert step.p.sum() == pytest.approx(1, abs=1e-5)
        return {"lm": [s.lm[ids[i]] for i, s in enumerate(steps)], "knn": [s.p[ids[i]] for i, s in enumerate(steps)]}

    found = in_stage("knn", searched, probabilities)
    for name in ("lm", "knn"):
        np.testing.assert_allclose(-np.log(found[name]), Losses.open(run.losses, "test", name).nats[:20], atol=2e-4)
    assert np.abs(np.array(found["lm"]) - found["knn"]).max() > 1e-3


def test_contexts_are_those_of_the_training_text(searched, made):
    run = RunDir(Path(searched.run_dir))
    tokens = TokenFiles.open(run.tokens(searched))
    train, words = tokens.split("train"), tokens.dictionary.words
    assert len(made.mixed) == len(made.alone) == 12
    for word in made.mixed:
        assert 0 < len(word.neighbours) <= 4
        assert [near.distance for near in word.neighbours] == sorted(near.distance for near in word.neighbours)
        for near in word.neighbours:
            assert near.token == near.row + searched.datastore.context_window
            assert near.word == words[train[near.token]]
            assert near.context == " ".join(words[i] for i in train[near.token - 6 : near.token])
            assert near.hit == (near.word == word.word)
        hits = sum(near.weight for near in word.neighbours if near.hit)
        assert hits <= word.p_knn + 1e-9
        assert (hits > 0) == (word.p_knn > 0)
        weight = made.frozen.weight
        assert word.p == pytest.approx((1 - weight) * word.p_lm + weight * word.p_knn, rel=1e-9)


def test_contexts_of_a_store_of_another_text_are_the_stores(searched, tmp_path):
    """The run's own token files are of another text with the same dictionary, and shorter than the store's."""
    lender = RunDir(Path(searched.run_dir))
    folders = [f"datastore.folder={lender.datastore}", f"index.folder={RunDir.of(searched).index}"]
    known = f"data.dictionary={lender.root / 'tokens' / 'dict.txt'}"
    text = write_text(tmp_path / "text", train_lines=20, seed=5)
    config = tiny_config(tmp_path / "run", text, [known, f"datastore.checkpoint={lender.root}", *folders])
    in_stage("prepare", config, run_prepare)
    shutil.copytree(lender.root / "tuned", tmp_path / "run" / "tuned")
    shutil.copy(lender.tuned, RunDir.of(config).tuned)
    stored, own = (TokenFiles.open(RunDir.of(run).tokens(run)) for run in (searched, config))
    assert own.dictionary.hash == stored.dictionary.hash and len(own.split("train")) < len(stored.split("train"))
    train, words = stored.split("train"), stored.dictionary.words
    shown = [near for word in generate(config).mixed for near in word.neighbours]
    asked = distlm.open_run(config.run_dir).next_word("w1 w2", contexts=4, context=6)
    for near in [*shown, *(near for word in asked for near in word.contexts)]:
        assert near.word == words[train[near.token]]
        assert near.context == " ".join(words[i] for i in train[near.token - 6 : near.token])
    assert max(near.token for near in shown) > len(own.split("train"))


def test_a_context_begins_with_the_store(searched):
    """The tokens before the first row are not stored."""

    def contexts(stage):
        source, rows, here = open_source(stage), np.arange(3), np.ones(3)
        generator = Generator(source)
        found = Found(rows, source.datastore[rows].values, here, here.astype(np.float32))
        return [generator.retrieved(found, place, 0, 2).context.split() for place in range(3)]

    tokens = TokenFiles.open(RunDir.of(searched).tokens(searched))
    first = searched.datastore.context_window
    words = [tokens.dictionary.words[i] for i in tokens.split("train")[first : first + 2]]
    assert in_stage("knn", searched, contexts) == [[], words[:1], words]


def test_a_seed_decides_the_text_and_neighbours_change_it(searched, made):
    again = generate(searched)
    assert again == made
    other = generate(searched, sampling=Sampling(12, False, 4, 1.0, 4, 6))
    assert [word.word for word in other.alone] != [word.word for word in made.alone]
    longer = generate(searched, "w1 w2 " + " ".join(word.word for word in made.mixed[:3]), lm_only=True)
    assert longer.mixed == []
    assert [word.p_knn for word in longer.alone] == [None] * 12


def test_greedy_takes_the_most_probable_word(searched):
    greedy = Sampling(5, True, 1, 1.0, 0, 0)
    assert generate(searched, "", greedy, lm_only=True).alone == generate(searched, "", greedy, lm_only=True).alone
    p = np.array([0.1, 0.4, 0.4, 0.1])
    assert choose(p, 0, greedy) == 1


def test_draws_follow_the_probabilities_and_top_p_cuts_them():
    p = np.array([0.0, 0.5, 0.05, 0.3, 0.15])
    counts = np.bincount([choose(p, step, Sampling(1, False, 7, 1.0, 0, 0)) for step in range(4000)], minlength=5)
    np.testing.assert_allclose(counts / 4000, p, atol=0.03)
    assert {choose(p, step, Sampling(1, False, 7, 0.6, 0, 0)) for step in range(300)} == {1, 3}
    assert {choose(p, step, Sampling(1, False, 7, 1e-9, 0, 0)) for step in range(20)} == {1}


def test_words_that_no_text_holds_are_never_drawn(searched):
    def masked(stage):
        generator = Generator(open_source(stage))
        dictionary = generator._forward.tokens.dictionary
        return [dictionary.words[i] for i in np.flatnonzero(~generator.possible)]

    refused = in_stage("knn", searched, masked)
    assert refused[:2] == ["<s>", "<pad>"]
    assert all(word.startswith("madeupword") for word in refused[2:])


def test_the_page_shows_every_word_and_escapes_the_text(made, tmp_path):
    angry = made.mixed[0].__class__("<b>&", False, 7, 0.5, 0.25, 0.75, made.mixed[0].neighbours)
    mixed = [angry, *made.mixed]
    named = Generation("<run>", "a<b", ["<x>"], made.alone, made.alone_text, mixed, "", made.sampling, made.frozen)
    write_page(named, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count('class="word"') == 13
    assert "<b>&<" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "a&lt;b" in page
    assert "&lt;x&gt;" in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script""", page)
    for near in made.mixed[-1].neighbours:
        assert escape(near.context) in page
    assert share_of_neighbours(angry, 0.5) == pytest.approx(0.75)
    weight = made.frozen.weight
    shares = [share_of_neighbours(word, weight) for word in mixed]
    most = mixed[int(np.argmax(shares))].word
    assert f"“{escape(most)}” has most of its probability from them, {max(shares):.0%}" in page
    assert f"{sum(share >= 0.5 for share in shares)} of 13 words half or more" in page
    text = generation_text(named)
    assert "not in the dictionary: <x>" in text
    assert f"[{made.mixed[0].neighbours[0].word}]" in text


def test_every_column_of_the_page_has_a_heading_that_the_glossary_explains(made, tmp_path):
    write_page(made, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    tables = re.findall(r"<table.*?</table>", page, re.DOTALL)
    assert len(tables) == 2 * len(made.mixed)
    for table, wanted in zip(tables, [*HEADS.values()] * len(made.mixed), strict=True):
        assert re.findall(r'<th scope="col" title="[^"]+">(\w+)</th>', table) == list(wanted)
        assert {row.count("<td>") for row in re.findall(r"<tr>(.*?)</tr>", table) if "<td>" in row} == {len(wanted)}
    glossary = Path(__file__).resolve().parents[3] / "docs/glossary.md"
    for term in TERMS:
        assert f"| **{term}** |" in glossary.read_text("utf-8") and f"<dt>{term}</dt>" in page, term
    hits = sum(near.hit for word in made.mixed for near in word.neighbours)
    assert page.count('<strong class="best">') == hits > 0


def test_the_page_says_where_no_word_came_from_the_neighbours(made, tmp_path):
    alone = [replace(word, p_knn=0.0) for word in made.mixed]
    write_page(replace(made, mixed=alone), tmp_path / "page.html")
    assert "Here none of it did." in (tmp_path / "page.html").read_text("utf-8")


def test_the_command(searched, tmp_path, capsys):
    words = arguments(Path(searched.run_dir), Path(searched.data.text_dir))
    with pytest.raises(SystemExit) as end:
        main(["generate", *words, "--prompt", "w1 nosuchword", "--tokens", "3", "--html", str(tmp_path / "g.html")])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("prompt  w1 nosuchword\nLM      ")
    assert "not in the dictionary: nosuchword" in shown
    assert (tmp_path / "g.html").is_file()


@pytest.mark.parametrize("change, message", [
    ({"tokens": 0}, "--tokens 0"), ({"top_p": 0.0}, "--top-p 0.0"), ({"top_p": 1.5}, "--top-p 1.5"),
    ({"shown": -1}, "--neighbours -1"), ({"seed": -1}, "--seed -1"),
])  # fmt: skip
def test_impossible_numbers_are_refused(searched, change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        generate(searched, sampling=Sampling(**({f: getattr(DRAWN, f) for f in DRAWN.__dataclass_fields__} | change)))


def test_settings_of_another_store_and_missing_ones_are_refused(searched, tmp_path):
    config = copy_run(searched, tmp_path / "run")
    run = RunDir.of(config)
    alter(run.tuned, datastore="0" * 32)
    with pytest.raises(DistlmError, match="tuned on another datastore"):
        generate(config)
    run.tuned.unlink()
    with pytest.raises(DistlmError, match="distlm knn tune"):
        generate(config)
    shutil.rmtree(run.datastore)
    assert math.isfinite(generate(config, lm_only=True).alone[0].p)
