"""Published sizes of the AWD-LSTM (Merity et al. 2017 give 24M and 33M; these are the authors' models exactly)."""

import pytest

from distlm.data.dictionary import Dictionary
from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.records import LstmCard
from distlm.models.described import card_of, parameter_count

LSTM_PARAMETERS = 7_139_200 + 10_589_200 + 2_483_200


@pytest.mark.parametrize(("words", "parameters"), [(10_000, 24_221_600), (33_278, 33_556_078)])
def test_parameters_over_the_published_vocabularies(words: int, parameters: int) -> None:
    """`words` counts <unk> and <eos>, as the corpora do; the dictionary has <s> and <pad> besides."""
    dictionary = Dictionary.from_counts({f"w{i}": 1 for i in range(words - 2)}, pad_to_multiple=1)
    assert len(dictionary) == words + 2
    assert parameter_count(LstmConfig(), len(dictionary)) == parameters
    assert parameters == LSTM_PARAMETERS + words * 400 + words
    card = card_of(LstmConfig(), len(dictionary), dictionary.hash, "hash of the weights")
    assert isinstance(card, LstmCard) and (card.rows, card.first_id) == (words, Dictionary.EOS)


def test_full_sized_embedding_of_the_ablations() -> None:
    """Table 4: 43M on PTB and 70M on WikiText-2."""
    millions = [round(parameter_count(LstmConfig(width=1150), words + 2) / 1e6) for words in (10_000, 33_278)]
    assert millions == [43, 70]
