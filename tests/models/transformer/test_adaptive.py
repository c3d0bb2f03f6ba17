"""Adaptive input and tied adaptive softmax."""

import pytest
import torch
from support.present import present

from distlm.models.linear_cross_entropy import linear_log_probs
from distlm.models.transformer import adaptive
from distlm.models.transformer.adaptive import AdaptiveInput, AdaptiveSoftmax, Bands

BANDS = Bands.plan(60, [16, 30], 24, 2)


def pair(dropout: float = 0.0) -> tuple[AdaptiveInput, AdaptiveSoftmax]:
    torch.manual_seed(0)
    embedding = AdaptiveInput(BANDS, 24)
    return embedding, AdaptiveSoftmax(embedding, dropout)


def test_bands() -> None:
    assert Bands((0, 16, 30, 60), (24, 12, 6)) == BANDS
    assert BANDS.sizes == (16, 14, 30)
    assert Bands.plan(267744, [20000, 60000], 1024, 4).widths == (1024, 256, 64)
    assert Bands.plan(20000, [20000, 60000], 1024, 4) == Bands((0, 20000), (1024,))


def test_the_whole_vocabulary_sums_to_one() -> None:
    _, softmax = pair()
    full = softmax.full_log_probs(torch.randn(7, 24))
    assert full.shape == (7, 60)
    torch.testing.assert_close(full.exp().sum(1), torch.ones(7))


def test_target_log_probs_are_those_of_the_full_distribution() -> None:
    _, softmax = pair()
    hidden, targets = torch.randn(60, 24), torch.randperm(60)
    expected = softmax.full_log_probs(hidden).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(softmax(hidden, targets), expected)


def test_parameters_are_shared_and_named_once() -> None:
    embedding, softmax = pair()
    whole = torch.nn.ModuleDict({"embedding": embedding, "softmax": softmax})
    names = [name for name, _ in whole.named_parameters()]
    assert names == [f"embedding.{kind}_{i}" for i in range(3) for kind in ("embedding", "projection")] + [
        "softmax.class_weight"
    ]
    own = dict(softmax.named_parameters(recurse=False))
    assert own["embedding_2"] is embedding.embedding(2)
    assert own["projection_1"] is embedding.projection(1)
    # Band 0 has the model's width: its projection belongs to the input alone.
    assert "projection_0" not in own


def test_the_input_looks_every_word_up_in_its_own_band() -> None:
    embedding, _ = pair()
    ids = torch.tensor([[0, 15, 16], [29, 30, 59]])
    vectors = embedding(ids)
    for word, vector in zip(ids.view(-1).tolist(), vectors.view(6, 24), strict=True):
        band = (word >= 16) + (word >= 30)
        row = embedding.embedding(band)[word - BANDS.edges[band]]
        torch.testing.assert_close(vector, embedding.projection(band) @ row)


def test_the_padding_word_gets_no_gradient_from_the_input() -> None:
    embedding, _ = pair()
    embedding(torch.tensor([[1, 5, 1, 17]])).sum().backward()
    gradient = present(embedding.embedding(0).grad)
    assert gradient[1].eq(0).all()
    assert gradient[5].ne(0).all()
    # Row 1 of a tail band is an ordinary word.
    assert present(embedding.embedding(1).grad)[1].ne(0).all()


@pytest.mark.parametrize("word", [-1, 60])
def test_words_outside_the_vocabulary_fail(word: int) -> None:
    embedding, softmax = pair()
    with pytest.raises((IndexError, RuntimeError)):
        embedding(torch.tensor([[3, word]]))
    with pytest.raises((IndexError, RuntimeError)):
        softmax(torch.randn(2, 24), torch.tensor([3, word]))


def test_dropout_reaches_input_and_tail_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    _, softmax = pair(dropout=0.5)
    hidden = torch.ones(4000, 24)
    seen: list[torch.Tensor] = []
    original = linear_log_probs

    def seeing(hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return original(hidden, *rest)

    monkeypatch.setattr(adaptive, "linear_log_probs", seeing)
    softmax(hidden, torch.full((4000,), 31))
    assert seen[0].eq(0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    torch.manual_seed(1)
    first = softmax._tail_logits(2, hidden[:5])
    assert not torch.equal(first, softmax._tail_logits(2, hidden[:5]))
    softmax.eval()
    assert torch.equal(softmax._tail_logits(2, hidden[:5]), softmax._tail_logits(2, hidden[:5]))
