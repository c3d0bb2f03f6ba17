"""KnnLogitsProcessor in `generate`: equal to a slow loop with and without cache, in batches and with beams."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.hf.runs import Made, counted
from torch import Tensor

import distlm
from distlm.errors import DistlmError, UsageError
from distlm.integrations.mixture import mixed
from distlm.integrations.taps import default_tap
from distlm.knnlm.tune.buckets import Buckets

NAMES = ["gpt2", "llama", "gemma2"]
Make = Callable[[str], Made]
LAM, T, K, STEPS = 0.6, 2.0, 24, 4
PROMPTS = ["w1 w2 w3 w0 w1", "w5", "w0 w0 w9"]


def stored(knn: distlm.KnnLM) -> tuple[np.ndarray, np.ndarray]:
    """Keys fp64 [N, D], and the tokenizer's ids that follow, int64 [N]."""
    store = knn.datastore
    keys = np.concatenate([np.asarray(store.keys(shard.index), np.float64) for shard in store.shards])
    values = np.concatenate([np.asarray(store.values(shard.index)) for shard in store.shards])
    return keys, np.where(values == 2, knn.subwords.line_end, values - 4)


def slow(knn: distlm.KnnLM, ids: list[int], lam: float | Callable[[float], float] = LAM) -> np.ndarray:
    """ln p of every next token, fp64 [V]: one pass without cache, every key compared, a dense p_kNN."""
    keys, values = stored(knn)
    path = knn.tap.removesuffix(":input")
    states: list[Tensor] = []
    hook = knn.model.get_submodule(path).register_forward_pre_hook(lambda _module, given: states.append(given[0]))
    with torch.inference_mode():
        logits = knn.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    hook.remove()
    query = states[0][0, -1].numpy().astype(np.float16).astype(np.float64)
    distances = np.square(keys - query).sum(axis=1)
    near = np.argsort(distances, kind="stable")[:K]
    weights = np.exp(-(distances[near] - distances[near[0]]) / T)
    dense = np.bincount(values[near], weights / weights.sum(), minlength=len(logits))
    share = lam if isinstance(lam, float) else lam(distances[near[0]])
    return np.log(share * dense + (1 - share) * torch.softmax(logits, 0).numpy())


@pytest.fixture(params=NAMES)
def knn(request: pytest.FixtureRequest, made: Make) -> distlm.KnnLM:
    run = made(request.param)
    return run.knn().add(run.split("train"), block=32).build_index("Flat")


@pytest.fixture
def prompts(knn: distlm.KnnLM) -> list[list[int]]:
    """As the tokenizer cuts them, with what it puts in front of a text."""
    begin = [knn.lm.config.begin] if knn.lm.begins else []
    return [[*begin, *map(int, knn.pieces(knn.ids(text))[:-1])] for text in PROMPTS]


def batch(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def generate(knn: distlm.KnnLM, given: dict[str, Tensor], processor: Any = None, **words: Any) -> Any:
    processor = processor or distlm.KnnLogitsProcessor(knn, lam=LAM, temperature=T, k=K)
    return knn.model.generate(
        **given, logits_processor=[processor], max_new_tokens=STEPS, return_dict_in_generate=True, output_scores=True,
        **words,
    )  # fmt: skip


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_is_a_slow_loop_in_a_padded_batch(knn: distlm.KnnLM, prompts: list[list[int]], cache: bool) -> None:
    with counted(knn.model) as passes:
        made = generate(knn, batch(prompts), do_sample=False, use_cache=cache)
    assert passes == [3] * STEPS, "one forward pass a step"
    longest = max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for step in range(STEPS):
            expected = slow(knn, ids)
            assert np.abs(made.scores[step][row].numpy() - expected).max() < 1e-4
            ids.append(int(made.sequences[row, longest + step]))
            assert expected[ids[-1]] >= expected.max() - 1e-5


@pytest.mark.parametrize("cache", [True, False])
def test_beams_are_those_of_a_slow_search(knn: distlm.KnnLM, prompts: list[list[int]], cache: bool) -> None:
    """Rows change places between steps; states must go with them."""
    beams = 3
    made = generate(knn, batch(prompts), num_beams=beams, num_return_sequences=beams, use_cache=cache,
                    do_sample=False)  # fmt: skip
    longest = max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        alive = [(0.0, list(prompt))]
        for _ in range(STEPS):
            grown = [
                (score + float(scores[token]), [*ids, int(token)])
                for score, ids in alive
                for scores in [slow(knn, ids)]
                for token in np.argsort(-scores)[: beams + 1]
            ]
            alive = sorted(grown, key=lambda item: -item[0])[:beams]
        for place, (score, ids) in enumerate(alive):
            found = made.sequences[row * beams + place, longest:].tolist()
            assert float(made.sequences_scores[row * beams + place]) == pytest.approx(score / STEPS, abs=1e-4)
            if place == 0 or alive[place - 1][0] - score > 1e-4:
                assert found == ids[len(prompt) :]


def test_lambda_by_distance(knn: distlm.KnnLM, prompts: list[list[int]]) -> None:
    nearest = knn.log_probs(knn.pieces(knn.ids("w1 w2 w3 w4 w5\n"))).lm
    assert np.isfinite(nearest).all()
    _, near = next(knn.scorer(knn.mixed(k=1)).blocks(knn.ids("w1 w2 w3 w4 w5\n"), 32, 32, 2))
    buckets = Buckets(np.quantile(near.distances[:, 0], [0.3, 0.6]).astype(np.float64), np.array([0.9, 0.5, 0.1]))
    knn.mixing = replace(knn.mixing, temperature=T, k=K, buckets=buckets)
    made = generate(knn, batch(prompts[:1]), distlm.KnnLogitsProcessor(knn), do_sample=False)
    ids, seen = list(prompts[0]), set()

    def lam(distance: float) -> float:
        seen.add(float(buckets.weights(np.array([distance]))[0]))
        return float(buckets.weights(np.array([distance]))[0])

    for step in range(STEPS):
        assert np.abs(made.scores[step][0].numpy() - slow(knn, ids, lam)).max() < 1e-4
        ids.append(int(made.sequences[0, len(prompts[0]) + step]))
    assert distlm.KnnLogitsProcessor(knn, lam=0.3).mixing.buckets is None


def test_nothing_of_lambda_0_and_warpers_come_after(knn: distlm.KnnLM, prompts: list[list[int]]) -> None:
    given = batch(prompts)
    plain = knn.model.generate(**given, max_new_tokens=STEPS, do_sample=False)
    none = distlm.KnnLogitsProcessor(knn, lam=0.0)
    assert torch.equal(generate(knn, given, none, do_sample=False).sequences, plain)
    # A processor that is closed, or gone, leaves no hook.
    none.close()
    assert not any(module._forward_pre_hooks for module in knn.model.modules())
    torch.manual_seed(0)
    drawn = generate(knn, given, do_sample=True, top_p=0.8, temperature=0.7)
    assert torch.isneginf(drawn.scores[0]).any()
    assert not any(module._forward_pre_hooks for module in knn.model.modules())
    # What was forbidden before stays so, whatever the neighbours say.
    banned = int(slow(knn, prompts[0]).argmax())
    made = generate(knn, batch(prompts[:1]), do_sample=False, suppress_tokens=[banned])
    assert banned not in made.sequences[0, len(prompts[0]) :].tolist() and torch.isneginf(made.scores[0][0, banned])


def test_another_model_is_found_out(made: Make) -> None:
    run = made("gpt2")
    knn = run.knn().add(run.split("train"), block=32).build_index("Flat")
    processor, other = distlm.KnnLogitsProcessor(knn, lam=0.5), run.model()
    given = batch([[5, 6, 7]])
    with pytest.raises(DistlmError, match="made no forward pass for these scores"):
        other.generate(**given, logits_processor=[processor], max_new_tokens=2, do_sample=False)
    for ids, said in (([[5, 6]] * 2, "scores of 1 rows"), ([[5, 6]], "was not for these tokens")):
        knn.model(input_ids=torch.tensor(ids))
        with pytest.raises(DistlmError, match=said):
            processor(given["input_ids"], torch.zeros(1, 300))
    # Drafts are scored many tokens at once.
    with pytest.raises(DistlmError, match="KnnLogitsProcessor: "):
        knn.model.generate(**batch([[5, 6, 7, 8] * 3]), logits_processor=[processor], max_new_tokens=4, do_sample=False,
                           prompt_lookup_num_tokens=2)  # fmt: skip
    with pytest.raises(UsageError, match="λ must be from 0 to 1"):
        distlm.KnnLogitsProcessor(knn, lam=2)
    with pytest.raises(DistlmError, match="no index"):
        distlm.KnnLogitsProcessor(run.knn().add("w1 w2\n"))


def test_the_mixture_by_hand() -> None:
    """The same token among the neighbours of a row counts with all its shares; a row without neighbours is the LM's."""
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf], [0.5, 0.5, 0.0, 0.0], [3.0, 0.0, 0.0, 1.0]])
    tokens, shares = (
        np.array([[2, 0, 2], [3, 1, -1], [-1, -1, -1]]),
        np.array([[0.5, 0.3, 0.2], [0.6, 0.4, 0], [0, 0, 0]]),
    )
    found = mixed(scores, tokens, shares, np.array([0.4, 1.0, 0.0]))
    p = torch.softmax(scores.double(), 1).numpy()
    assert np.allclose(found[0].exp(), 0.6 * p[0] + 0.4 * np.array([0.3, 0, 0.7, 0]), atol=1e-6)
    assert np.allclose(found[1].exp(), [0, 0.4, 0, 0.6], atol=1e-6) and torch.isneginf(found[1, 0])
    assert torch.allclose(found[2], scores[2].log_softmax(0))


@pytest.mark.parametrize(("kind", "sizes", "tap"), [
    ("gpt_neox", {}, "gpt_neox.layers.1.mlp:input"), ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "model.decoder.layers.1.fc1:input"), ("bloom", {"n_layer": 2, "n_head": 2}, "transformer.h.1.mlp:input"),
    ("mistral", {"num_key_value_heads": 1}, "model.layers.1.mlp:input"), ("xglm", {"d_model": 32, "num_layers": 2,
    "attention_heads": 2, "ffn_dim": 48}, "model.layers.1.fc1:input"),
])  # fmt: skip
def test_the_last_feed_forward_layer_is_found(kind: str, sizes: dict[str, int], tap: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                  intermediate_size=48, **sizes)  # fmt: skip
    assert default_tap(AutoModelForCausalLM.from_config(config)) == tap
