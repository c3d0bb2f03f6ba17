"""λ by a run's gate: the numbers of `distlm knn evaluate`, and the same of a text that `generate` goes on with."""

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.hf.runs import Made, with_gate
from support.present import present

import distlm
from distlm.errors import DistlmError, UsageError
from distlm.integrations.gated import GatedWeights, TextBefore
from distlm.integrations.lm_eval import DistlmModel
from distlm.knnlm.evaluate.losses import Losses
from distlm.knnlm.tune.gate import BEFORE, SKIPS, of_tokens_before

RULE: dict[str, Any] = {"context_window": 32, "block": 32, "batch_blocks": 4}
STEPS = 4
Make = Callable[[str], Made]


@pytest.fixture(scope="module", params=["gpt2", "llama-begins"])
def gated(request: pytest.FixtureRequest, made: Make, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run whose gate was fitted on valid, evaluated on test."""
    return with_gate(made(request.param), tmp_path_factory.mktemp(request.param) / "run")


@pytest.fixture
def knn(gated: Made) -> distlm.KnnLM:
    knn = distlm.KnnLM.of_run(gated.run.root, mixture="gate")
    knn.model.generation_config.eos_token_id = None
    return knn


def test_numbers_are_those_of_knn_evaluate(gated: Made, knn: distlm.KnnLM) -> None:
    found = knn.log_probs(gated.split("test"), **RULE)
    assert np.abs(found.mixture + Losses.open(gated.run.losses, "test", "gate").nats).max() < 1e-5
    assert np.abs(found.mixture - knn.log_probs(gated.split("test"), lam=knn.mixing.lam, **RULE).mixture).max() > 1e-3
    # In batches of another size, whose edges lie elsewhere.
    other = knn.log_probs(gated.split("test"), **{**RULE, "batch_blocks": 3})
    assert np.abs(found.mixture - other.mixture).max() < 1e-5


def test_what_precedes_a_token_goes_over_the_edges_of_batches() -> None:
    random = np.random.default_rng(1)
    counts, log_probs, ids = random.random(9), -random.random(40), random.integers(0, 9, 40)
    before, edges = TextBefore(counts), [0, 1, 3, 17, 18, 40]
    parts = [before.others(log_probs[a:b], ids[a:b]) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), of_tokens_before(log_probs, counts[ids]))


def slow(knn: distlm.KnnLM, ids: list[int]) -> tuple[np.ndarray, float]:
    """ln p of every next token, fp64 [V], and λ: one pass over the whole text, without a cache."""
    gate = present(knn.mixing.gate)
    states: list[torch.Tensor] = []
    module = knn.model.get_submodule(knn.tap.removesuffix(":input"))
    hook = module.register_forward_pre_hook(lambda _module, given: states.append(given[0]))
    with torch.inference_mode():
        logits = knn.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    hook.remove()
    log_probs = logits.log_softmax(dim=1)
    others = np.zeros(2 * BEFORE)
    for back in range(1, min(BEFORE, len(ids)) + 1):
        token = ids[-back]
        if back < len(ids):
            others[back - 1] = log_probs[-back - 1, token]
        others[BEFORE + back - 1] = gate.counts[knn.rows_of_pieces(np.array([token]))[0]]
    query = states[0][0, -1].numpy().astype(np.float16).astype(np.float64)
    z = np.concatenate([query, others]) @ gate.gate.weights.astype(np.float64) + gate.gate.bias
    lam = float(0.99 / (1 + np.exp(-z)))
    near = knn.retriever.search(states[0][0, -1:].numpy(), knn.mixing.k, knn.mixing.candidates)
    dense = np.zeros(logits.shape[1])
    np.add.at(dense, knn.pieces(near.values[0]), near.shares(knn.mixing.temperature)[0])
    if lam < gate.gate.thresholds[SKIPS.index(gate.skip)]:
        lam = 0.0
    return np.log(lam * dense + (1 - lam) * torch.softmax(logits[-1], 0).numpy()), lam


def prompts(knn: distlm.KnnLM, gated: Made) -> list[list[int]]:
    """Of one, two, five and many tokens, each behind what the tokenizer puts in front of a text."""
    ids = list(map(int, knn.pieces(knn.ids(gated.split("test")))))
    begin = [knn.lm.config.begin] if knn.lm.begins else []
    return [[*begin, *ids[:count]] for count in (1, 2, 5, 12)]


def batch(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generate(knn: distlm.KnnLM, given: dict[str, torch.Tensor], **words: Any) -> Any:
    return knn.model.generate(
        **given, logits_processor=[distlm.KnnLogitsProcessor(knn)], max_new_tokens=STEPS, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, do_sample=False, **words,
    )  # fmt: skip


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_is_a_slow_loop_in_a_padded_batch(gated: Made, knn: distlm.KnnLM, cache: bool) -> None:
    texts, shares = prompts(knn, gated), set()
    made = generate(knn, batch(texts), use_cache=cache)
    for row, prompt in enumerate(texts):
        ids = list(prompt)
        for step in range(STEPS):
            expected, lam = slow(knn, ids)
            shares.add(round(lam, 6))
            assert np.abs(made.scores[step][row].numpy() - expected).max() < 1e-4
            ids.append(int(made.sequences[row, max(map(len, texts)) + step]))
    assert len(shares) > STEPS, "each token has a λ of its own"


@pytest.mark.parametrize("cache", [True, False])
def test_rows_that_change_places_keep_what_precedes_them(gated: Made, knn: distlm.KnnLM, cache: bool) -> None:
    """Beams: the score of each is the sum over a slow loop of its own tokens."""
    texts, beams = prompts(knn, gated), 3
    made = generate(knn, batch(texts), use_cache=cache, num_beams=beams, num_return_sequences=beams)
    longest = max(map(len, texts))
    for row, prompt in enumerate(texts):
        for beam in range(beams):
            ids, total = list(prompt), 0.0
            for token in made.sequences[row * beams + beam, longest:].tolist():
                total += float(slow(knn, ids)[0][token])
                ids.append(token)
            assert float(made.sequences_scores[row * beams + beam]) == pytest.approx(total / STEPS, abs=1e-4)


def test_a_cache_of_fixed_size_and_a_prompt_in_parts(gated: Made, knn: distlm.KnnLM) -> None:
    """Masks of another form, and several passes over one prompt, give the same scores."""
    texts = prompts(knn, gated)
    plain = generate(knn, batch(texts))
    for words in ({"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"prefill_chunk_size": 11}):
        other = generate(knn, batch(texts), **words)
        assert torch.equal(other.sequences, plain.sequences)
        for one, two in zip(plain.scores, other.scores, strict=True):
            assert float((one - two).abs().max()) < 1e-4, words


def test_another_thread_has_its_own(gated: Made, knn: distlm.KnnLM) -> None:
    """A pass that another thread makes between the pass of a prompt and its scores says nothing of it."""
    processor, (ids,) = distlm.KnnLogitsProcessor(knn), batch(prompts(knn, gated)[-1:])["input_ids"][None]
    with torch.inference_mode():
        logits = knn.model(input_ids=ids).logits[:, -1]
        alone = processor(ids, logits)
        knn.model(input_ids=ids)
        thread = threading.Thread(target=lambda: knn.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])))
        thread.start()
        thread.join()
        assert torch.equal(processor(ids, logits), alone)


def test_a_loop_of_ones_own(gated: Made, knn: distlm.KnnLM) -> None:
    """With gradients on, tokens that the tokenizer has not, and padding of any number; nothing before is refused."""
    beyond = knn.model.get_input_embeddings().num_embeddings
    knn.model.resize_token_embeddings(beyond + 8)
    processor, ids = distlm.KnnLogitsProcessor(knn), torch.tensor([[beyond + 1, 5, 6], [7, beyond + 2, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    scores = processor(ids, knn.model(input_ids=ids, attention_mask=mask).logits[:, -1])
    assert torch.isfinite(scores).all()
    other = ids.clone()
    other[0, 0] = 3
    again = processor(other, knn.model(input_ids=other, attention_mask=mask).logits[:, -1])
    assert float((scores - again).abs().max().detach()) < 1e-4
    with pytest.raises(DistlmError, match="give `generate` input_ids"):
        embedded = knn.model.get_input_embeddings()(ids)
        processor(ids[:, :0], knn.model(inputs_embeds=embedded).logits[:, -1])
    module = knn.model.get_submodule(knn.tap.removesuffix(":input"))
    hook = module.register_forward_pre_hook(lambda _module, given: (given[0] * 1e9, *given[1:]), prepend=True)
    with pytest.raises(DistlmError, match="NaN or infinite"), torch.no_grad():
        processor(ids, knn.model(input_ids=ids).logits[:, -1])
    hook.remove()


def test_skipped_rows_are_not_searched_for(gated: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    knn = distlm.KnnLM.of_run(gated.run.root, mixture="gate", skip=0.5)
    texts = prompts(knn, gated)
    searched: list[int] = []
    search = type(knn.retriever).search

    def counting(own: Any, states: np.ndarray, *words: Any) -> Any:
        searched.append(len(states))
        return search(own, states, *words)

    monkeypatch.setattr(type(knn.retriever), "search", counting)
    made = generate(knn, batch(texts))
    rows = sum(searched)
    longest, wanted = max(map(len, texts)), 0
    for row, prompt in enumerate(texts):
        for step in range(STEPS):
            ids = [*prompt, *made.sequences[row, longest : longest + step].tolist()]
            expected, lam = slow(knn, ids)
            wanted += lam > 0
            assert np.abs(made.scores[step][row].numpy() - expected).max() < 1e-4
    assert rows == wanted < STEPS * len(texts)


def test_what_cannot_be_is_refused(made: Make, gated: Made, knn: distlm.KnnLM) -> None:
    run = gated.run.root
    for act, said in (
        (lambda: distlm.KnnLM.of_run(run, mixture="gates"), "choose one of knn, knn_buckets, gate"),
        (lambda: distlm.KnnLM.of_run(run, skip=0.5), "add mixture='gate'"),
        (lambda: distlm.KnnLM.of_run(run, mixture="gate", skip=0.25), "must be one of 0.0, 0.1"),
        (lambda: DistlmModel(knn_lm=knn), "take mixture='knn' or 'knn_buckets'"),
    ):
        with pytest.raises(UsageError, match=said):
            act()
    for mixture in ("knn", "knn_buckets"):
        mixing = DistlmModel(knn_lm=knn, mixture=mixture).scorer.scorer.mixing
        assert mixing.gate is None and (mixing.buckets is None) == (mixture == "knn")
    assert isinstance(knn.mixed().gate, GatedWeights) and knn.mixed(lam=0.2).gate is None
    # One processor for two generations at once: the second's rows follow nothing.
    processor = distlm.KnnLogitsProcessor(knn)
    first, other = batch([[5, 6, 7, 8]])["input_ids"], batch([[5, 6, 9, 8, 4]])["input_ids"]
    with torch.inference_mode():
        past = knn.model(input_ids=first)
        processor(first, past.logits[:, -1])
        step = knn.model(input_ids=other[:, -1:], past_key_values=past.past_key_values)
        with pytest.raises(DistlmError, match="one generation at a time"):
            processor(other, step.logits[:, -1])
    with pytest.raises(DistlmError, match="no gate; set knn"):
        distlm.KnnLM.of_run(made("gpt2").run.root, mixture="gate")
    assert replace(knn.mixing, gate=None).searches
