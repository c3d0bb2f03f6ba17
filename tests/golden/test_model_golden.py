"""Published and computed values of the WikiText-103 model and recipe (fairseq transformer_lm_wiki103)."""

import pytest

from distlm.config.training import BlocksConfig
from distlm.models.described import parameter_count
from distlm.models.transformer.config import TransformerConfig
from distlm.optim.schedule import learning_rate

VOCABULARY = 267744


def test_the_model_has_246_93_million_parameters() -> None:
    """Baevski & Auli table 2 gives 247M, fairseq's model card 246.9M."""
    width, ffn = 1024, 4096
    layer = 4 * (width * width + width) + (width * ffn + ffn) + (ffn * width + width) + 2 * 2 * width
    bands = [(20000, 1024), (40000, 256), (VOCABULARY - 60000, 64)]
    tied = sum(words * inner + width * inner for words, inner in bands)
    expected = 16 * layer + tied + 2 * width
    assert parameter_count(TransformerConfig(), VOCABULARY) == expected == 246_933_504
    assert f"{expected / 1e6:.2f}" == "246.93"


def test_the_recipes_learning_rate() -> None:
    recipe = BlocksConfig()
    golden = {0: 1e-7, 8000: 0.50000005, 16000: 1.0, 50000: 0.961385, 151000: 0.50005, 285999: 1.000e-4, 286000: 0.75}
    for update, rate in golden.items():
        assert learning_rate(recipe, update) == pytest.approx(rate, rel=1e-6), update
