"""KnnLM: the numbers of `distlm knn evaluate`, stores in memory and in folders, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hf.runs import SETTINGS, Made
from support.knn import in_stage
from support.present import present

import distlm
from distlm.config.load import load_config
from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError, UsageError
from distlm.index import run_index_build
from distlm.knnlm.evaluate.losses import Losses
from distlm.knnlm.tune.buckets import Buckets
from distlm.knnlm.tune.records import Tuned
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage

RULE: dict[str, Any] = {"context_window": 32, "block": 32, "batch_blocks": 4}
NAMES = ["gpt2", "llama", "llama-begins", "gemma2"]
Make = Callable[[str], Made]


def losses(made: Made, name: str) -> np.ndarray:
    """ln p of every valid token by `distlm knn evaluate`."""
    return -Losses.open(made.run.losses, "valid", name).nats


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_knn_evaluate(made: Make, name: str) -> None:
    """Built alike in memory, and with the run's own store and index opened."""
    run, tuned = made(name), Tuned.read(made(name).run.tuned)
    alike = run.knn().add(run.split("train"), **RULE, rows_per_shard=512)
    alike.build_index("IVF16,PQ4", nprobe=4, sample=4096)
    opened = run.knn().open(run.run.datastore).open_index(run.run.index, nprobe=4)
    assert alike.rows == opened.rows and alike.tap == opened.tap == run.config.datastore.tap
    for shard in opened.datastore.shards:
        for array in ("keys", "values"):
            own, theirs = (getattr(one.datastore, array)(shard.index) for one in (alike, opened))
            assert own.dtype == theirs.dtype and np.array_equal(own, theirs)
    settings: dict[str, Any] = {"lam": tuned.weight, "temperature": tuned.temperature, "k": tuned.k}
    assert present(tuned.weight) > 0
    for knn in (alike, opened):
        # The run searches for knn.k neighbours and counts the tuned k of them.
        knn.mixing = replace(knn.mixing, candidates=knn.retriever.candidates(run.config.knn.k))
        found = knn.log_probs(run.split("valid"), **settings, **RULE)
        assert np.abs(found.lm - losses(run, "lm")).max() < 1e-5
        assert np.abs(found.mixture - losses(run, "knn")).max() < 1e-5
        targets = Losses.open(run.run.losses, "valid", "lm").targets
        assert np.array_equal(found.tokens, knn.pieces(targets))
        knn.mixing = replace(knn.mixed(**settings), buckets=Buckets.of(present(tuned.buckets)))
        # The run's own figures of the tuned split are cross-fitted: each half with the buckets of the other.
        both = knn.log_probs(run.split("valid"), **RULE).mixture
        assert np.isfinite(both).all() and not np.array_equal(both, found.mixture)
    assert np.array_equal(alike.log_probs(found.tokens, **settings, **RULE).mixture,
                          alike.log_probs(run.split("valid"), **settings, **RULE).mixture)  # fmt: skip


def test_a_finished_run_as_it_is(made: Make, tmp_path: Path) -> None:
    """Its settings are those that were tuned, λ by distance among them."""
    run = made("gpt2")
    knn, tuned = distlm.KnnLM.of_run(run.run.root), Tuned.read(run.run.tuned)
    found = knn.log_probs(run.split("valid"), lam=knn.mixing.lam, **RULE).mixture
    assert np.abs(found - losses(run, "knn")).max() < 1e-5
    assert np.array_equal(present(knn.mixing.buckets).lambdas, present(tuned.buckets).lambdas)
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    processor = distlm.KnnLogitsProcessor(knn)
    out = knn.model.generate(**given, logits_processor=[processor], max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 5) and processor.mixing.buckets is knn.mixing.buckets
    with pytest.raises(DistlmError, match="nothing"):
        distlm.KnnLM.of_run(tmp_path / "nothing")


@pytest.mark.parametrize("wrong, message", [
    ({"temperatures": [0]}, r"temperatures=\[0\]: each must be above 0"), ({"ks": [0]}, r"ks=\[0\]: each must be"),
    ({"temperatures": [1.0, -2.0]}, "each must be above 0"), ({"ks": [4, -1]}, "each must be at least 1"),
    ({"lambdas": [1.0]}, r"lambdas=\[1\.0\]: each must be in \[0, 1\)"), ({"buckets": -1}, "buckets=-1: must not be"),
    ({"context_window": -1}, "context_window=-1"),
])  # fmt: skip
def test_grids_that_cannot_be_tried_are_refused(made: Make, wrong: dict[str, Any], message: str) -> None:
    knn = made("gpt2").knn().add("w1 w2 w3").build_index()
    before = knn.mixing
    with pytest.raises(UsageError, match=message):
        knn.tune("w1 w2", **wrong)
    assert knn.mixing is before


def test_a_store_of_another_tokenizer_is_refused_with_a_mend_that_is_there(made: Make) -> None:
    with pytest.raises(DistlmError, match=r"another dictionary.*make the KnnLM with the tokenizer") as caught:
        made("gpt2").knn().open(made("llama").run.datastore)
    assert "data.tokens_dir" not in str(caught.value)


def test_the_model_stays_as_it_is(made: Make) -> None:
    run = made("gpt2")
    model = run.model().train()
    model.transformer.h[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    knn = run.knn(model).add(run.split("train")).build_index()
    first = knn.log_probs(run.split("valid")).mixture
    assert np.array_equal(knn.log_probs(run.split("valid")).mixture, first)
    assert model.training and not model.transformer.h[0].training and model.transformer.h[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_text_begins_as_the_tokenizer_begins_it(made: Make, tmp_path: Path) -> None:
    """Unless another piece is named, or none; a store of another rule is refused, with advice that works."""
    run, text = made("gemma2"), "w1 w2 w3\n"
    knn, bare = run.knn(), run.knn(begin="none")
    first = knn.lm.config.begin
    assert (first, bare.lm.begins, made("llama").knn().lm.begins) == (1, False, False)
    ids = torch.tensor(run.tokenizer()("w1 w2 w3").input_ids)
    with torch.inference_mode():
        own = run.model()(input_ids=ids[None]).logits[0].double().log_softmax(1)
    found = knn.log_probs(text)
    assert ids[0] == first and np.array_equal(found.tokens[:-1], ids[1:])
    assert np.abs(found.lm[:-1] - own[torch.arange(len(ids) - 1), ids[1:]].numpy()).max() < 1e-5
    assert np.abs(bare.log_probs(text).lm - found.lm).max() > 1e-2
    # The tokenizer's ids of a text: what is in front of them is no token of the text.
    assert np.array_equal(knn.ids(ids.tolist()), knn.ids(text)[:-1])
    assert np.array_equal(bare.ids(ids.tolist()), ids.numpy() + 4)
    for window, (writer, reader, said) in enumerate((
        (knn, "none", r"was written with a beginning-of-text token .* has none; make it with begin=PIECE"),
        (bare, "auto", r"was written without a .* has '<bos>'; make it with begin='none'"),
    )):  # fmt: skip
        folder = tmp_path / reader
        writer.add(run.split("train"), folder, context_window=32 * window, block=32)
        rule = Datastore.open(folder).manifest.context
        assert bool(rule.begins) == ("after the beginning-of-text token" in rule.rule) == writer.lm.begins
        with pytest.raises(DistlmError, match=said):
            run.knn(begin=reader).open(folder)
        run.knn(begin="<bos>" if writer is knn else "none").open(folder)
    with pytest.raises(UsageError, match=r"begin='<s>': the tokenizer has no such piece; set it to auto or none"):
        run.knn(begin="<s>")


def test_flat_is_every_key_and_more_texts_are_more_rows(made: Make) -> None:
    run = made("gpt2")
    lines = run.split("train").split("\n")[:-1]
    whole = run.knn().add(lines, block=32).build_index("Flat")
    first, second = lines[:100], lines[100:]
    parts = run.knn().add("\n".join(first) + "\n", block=32).add(second, block=32).build_index("Flat")
    assert whole.rows == parts.rows == len(whole.ids(lines))
    values = [
        np.concatenate([knn.datastore.values(shard.index) for shard in knn.datastore.shards]) for knn in (whole, parts)
    ]
    assert np.array_equal(values[0], values[1])
    tokens = parts.ids(run.split("valid"))[:40]
    found = parts.scorer(parts.mixed(k=7)).blocks(tokens, 32, 32, 2)
    keys = np.concatenate([parts.datastore.keys(shard.index) for shard in parts.datastore.shards]).astype(np.float64)
    for batch, near in found:
        queries = batch.keys.numpy().astype(np.float16).astype(np.float64)
        distances = np.square(queries[:, None] - keys[None]).sum(axis=2)
        assert np.allclose(near.distances, np.sort(distances, axis=1)[:, :7], rtol=1e-5, atol=1e-6)
        assert np.array_equal(near.values, values[1][near.ids])


def test_a_folder_is_a_datastore_of_the_project(made: Make, tmp_path: Path) -> None:
    run, folder = made("llama"), tmp_path / "store"
    knn = run.knn().add(run.split("train"), folder, **RULE, rows_per_shard=512)
    store, theirs = Datastore.open(folder), Datastore.open(run.run.datastore)
    assert [shard.keys_hash for shard in store.shards] == [shard.keys_hash for shard in theirs.shards]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run.knn().add(run.split("train"), folder, **RULE, rows_per_shard=512)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    config = load_config("hf", [*SETTINGS, f"datastore.folder={folder}", f"run_dir={tmp_path / 'other'}",
                                "hf.name=any", "data.tokenizer=any"])  # fmt: skip
    in_stage("index", config, _build)
    knn.open_index(RunDir.of(config).index, nprobe=4)
    again = run.knn().open(folder).build_index("IVF16,PQ4", nprobe=4, sample=4096)
    text = run.split("valid")
    assert np.abs(knn.log_probs(text).mixture - again.log_probs(text).mixture).max() < 1e-6
    with pytest.raises(UsageError, match="there is a datastore already"):
        knn.add("w1 w2\n")
    with pytest.raises(DistlmError, match=r"begun with other settings .*datastore.block: 32 there, 16 now"):
        run.knn().add(run.split("train"), folder, **{**RULE, "block": 16})


def _build(stage: Stage) -> None:
    run_index_build(stage)


def test_tuning_finds_what_the_grid_holds(made: Make) -> None:
    run = made("gpt2")
    knn = run.knn().open(run.run.datastore).open_index(run.run.index, nprobe=4)
    knn.mixing = knn.mixed(k=16)
    found = knn.tune(run.split("valid"), lambdas=[0, 0.2, 0.4, 0.6], ks=[8], buckets=4, **RULE)
    tuned = Tuned.read(run.run.tuned)
    assert (found.lam, found.temperature, found.k) == (tuned.weight, tuned.temperature, tuned.k)
    assert np.allclose(present(found.buckets).edges, present(tuned.buckets).edges, atol=1e-5)
    assert np.array_equal(present(found.buckets).lambdas, present(tuned.buckets).lambdas)
    constant = knn.log_probs(run.split("valid"), lam=found.lam, **RULE).mixture
    assert knn.log_probs(run.split("valid"), **RULE).mixture.mean() > constant.mean()
    nothing = knn.log_probs(run.split("valid"), lam=0, **RULE)
    assert np.array_equal(nothing.mixture, nothing.lm)


def test_a_long_context_leaves_a_block_what_the_model_takes(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model takes 96 tokens; what is left open never makes the other length one that is refused, or one token."""
    monkeypatch.setattr("distlm.integrations.knn_lm.BLOCK", 16)
    run = made("gpt2")
    for window, block in ((0, 32), (8, 24), (32, 32), (40, 40), (80, 16)):
        knn = run.knn().add(run.split("train"), context_window=window)
        assert present(knn.datastore.manifest.context.block) == block
    monkeypatch.setattr("distlm.integrations.knn_lm.BLOCK", 512)
    text = run.split("valid")[:200]
    plain = run.knn()
    for given, whole in (({"context_window": 80}, (80, 16)), ({"block": 90}, (6, 90)), ({}, (48, 48))):
        window, block = whole
        assert np.array_equal(
            plain.log_probs(text, **given).lm, plain.log_probs(text, context_window=window, block=block).lm
        )


def test_what_cannot_be_is_refused(made: Make, tmp_path: Path) -> None:
    run, other = made("gpt2"), made("llama")
    knn = run.knn()
    for act, said in (
        (lambda: knn.datastore, r"call add\(texts\) or open\(folder\) first"),
        (lambda: knn.add(""[:0].split("x")[:0]), "there is no token"),
        (lambda: knn.add([400]), "ids from 400 to 400: the tokenizer has those from 0 to 299"),
        (lambda: knn.add("w1\n", context_window=90, block=90), "max_positions=96"),
        (lambda: knn.add("w1\n", key_dtype="int8"), "key_dtype='int8'"),
        (lambda: knn.open(tmp_path), "no datastore here"),
        (lambda: knn.open(other.run.datastore), "datastore of another dictionary"),
        (lambda: run.knn(tap="transformer.h.7.mlp:input"), "no such hidden state"),
        (lambda: run.knn(tap="output").open(run.run.datastore), "leave the tap out"),
        (lambda: distlm.KnnLM(other.model(), run.tokenizer()), "300 pieces, the model 30 rows"),
        (lambda: distlm.KnnLM(run.model(), object()), "a object has no tokenizer.json"),
        (lambda: run.knn(line_end="\\o/"), r"data.line_end='\\\\o/'"),
        (lambda: knn.log_probs("w1", lam=1.5), "λ must be from 0 to 1"),
        (lambda: knn.log_probs("w1", temperature=0), "temperature=0: must be above 0"),
        (lambda: knn.log_probs("w1", block=80, context_window=80), "choose context_window=16 or less"),
    ):  # fmt: skip
        with pytest.raises(DistlmError, match=said):
            act()
    knn.add("w1 w2\n")
    with pytest.raises(DistlmError, match=r'no index of the \d+ rows yet: call build_index\("Flat"\)'):
        knn.log_probs("w1")
    with pytest.raises(DistlmError, match="IVF"):
        knn.build_index("HNSW32")
    with pytest.raises(UsageError, match="nprobe=0"):
        knn.build_index("IVF4,Flat", nprobe=0)


def test_a_store_of_another_model_is_found_out(made: Make, tmp_path: Path) -> None:
    run = made("gpt2")
    model = run.model()
    for window in (0, 32):
        folder = tmp_path / f"store{window}"
        run.knn(model).add(run.split("train"), folder, context_window=window, block=32)
        run.knn(model).open(folder)
        other = run.model()
        torch.nn.init.normal_(other.transformer.h[0].mlp.c_fc.weight, std=0.5)
        with pytest.raises(DistlmError, match=r"keys of another model: those of rows \d+ to \d+"):
            run.knn(other).open(folder)
    # Half precision is the same model.
    run.knn(run.model().bfloat16()).open(tmp_path / "store32")
