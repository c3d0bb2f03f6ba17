"""States of a text that grows word by word, without computing again what was computed."""

from collections.abc import Sequence
from typing import Any

import torch

from distlm.models.language_model import LanguageModel, LMOutput


class Growing:
    """What a model keeps of one text from pass to pass (LanguageModel.new_past), if it keeps anything."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._past: Any = None
        self._passed: list[int] = []
        """Tokens that `_past` holds."""

    @torch.inference_mode()
    def states(self, inputs: Sequence[int], tap: str | None) -> LMOutput:
        """States [1, t, D] of the last t ≥ 1 tokens of `inputs`, ids that are given to the model as they are.

        What a text has in common with the one before it in full is not computed again; a window that has moved is,
        because every position in it has another number.
        """
        model, inputs = self.model, list(inputs)
        past, known = self._past, len(self._passed)
        if past is None or not 0 < known < len(inputs) or inputs[:known] != self._passed:
            past, known = model.new_past(), 0
        # A pass that fails has taken in who knows what.
        self._past = None
        new = torch.tensor([inputs[known:]], device=next(model.parameters()).device)
        # Only a model that keeps something takes the word.
        output: LMOutput = model(new, tap=tap) if past is None else model(new, tap=tap, past=past)
        self._past, self._passed = past, inputs
        return output
