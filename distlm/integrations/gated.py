"""λ of each token by a run's gate, from what is known before its search (He et al. 2021)."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distlm.errors import DistlmError, UsageError
from distlm.knnlm.scoring import Floats
from distlm.knnlm.tune.gate import BEFORE, SKIPS, Features, Gate, of_tokens_before

LEAST = -100.0
"""Smallest ln p that is a feature: a token that a processor had forbidden has −∞."""


@dataclass(frozen=True)
class GatedWeights:
    """The gate of a run, and what it reads of the training text."""

    gate: Gate
    counts: Floats
    """fp64 [V]: log(1 + count in the training text) of each id of the dictionary."""
    skip: float = 0.0
    """Share of the tuned split's tokens that were not searched for: λ is 0 below the threshold that left them out.
    Raises UsageError where it is none of 0, 0.1, …, 1."""

    def __post_init__(self) -> None:
        if self.skip not in SKIPS:
            raise UsageError(f"skip={self.skip}: must be one of {', '.join(map(str, SKIPS))}")

    def lambdas(self, queries: npt.NDArray[np.floating], others: npt.NDArray[np.float32]) -> Floats:
        """λ of each token: fp64 [n], 0 for those that are skipped. `queries` [n, D] in the keys' dtype, `others` fp32
        [n, 2 · BEFORE] as gate.Features."""
        found = self.gate.lambdas(Features(queries, others))
        return np.where(found >= self.gate.thresholds[SKIPS.index(self.skip)], found, 0.0)


class TextBefore:
    """What precedes each token of one text that comes in batches, in order."""

    def __init__(self, counts: Floats) -> None:
        self._counts = counts
        self._log_probs, self._ids = np.empty(0), np.empty(0, np.int64)

    def others(self, log_probs: Floats, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """fp32 [n, 2 · BEFORE] of the next n tokens, from ln p fp64 [n] and ids of the dictionary int [n] of each."""
        kept = len(self._ids)
        self._log_probs = np.concatenate([self._log_probs, log_probs])
        self._ids = np.concatenate([self._ids, ids])
        found = of_tokens_before(self._log_probs, self._counts[self._ids])[kept:]
        self._log_probs, self._ids = self._log_probs[-BEFORE:], self._ids[-BEFORE:]
        return found


class GeneratedBefore:
    """What precedes the next token of each row of a generation, newest first.

    ln p of a prompt's last tokens comes from the pass over the prompt, whose last states a hook keeps; that of each
    generated token from the scores that it was drawn from, so that rows may change places, as beams do: a row is
    found again by its tokens. The hook stands on the model until `close`, or until this object is gone.
    """

    def __init__(self, hf: Any, log_probs: Callable[[Tensor], Tensor], ids: Callable[[Any], Any]) -> None:
        """`hf`: the model that generates; `log_probs`: its states [n, D] → ln p fp32 [n, V] of each id of the
        dictionary; `ids`: the tokenizer's ids → the dictionary's, int64, the same shape."""
        self._log_probs, self._ids = log_probs, ids
        self._passed: list[_Passed] = []
        base = hf.base_model
        hook = base.register_forward_hook(_keep(self._passed), with_kwargs=True)
        self.close = weakref.finalize(self, hook.remove)
        self._rows: dict[bytes, int] = {}
        """The rows of the step before by their tokens."""
        self._known, self._there = np.zeros((2, 0, BEFORE))
        """fp64 [B, BEFORE] of the step before: ln p of the tokens before, and 1 where there is such a token, else 0."""
        self._scores = torch.zeros(0)
        """[B, V] of the step before: what its next tokens were drawn from."""

    def others(self, input_ids: Tensor, scores: Tensor, counts: Floats) -> npt.NDArray[np.float32]:
        """fp32 [B, 2 · BEFORE] of the tokens that follow input_ids [B, T], whose scores of the model are [B, V].

        Raises DistlmError where the rows are neither those of the pass over a prompt nor follow those of the last step.
        """
        passed = self._passed.pop() if self._passed else None
        self._passed.clear()
        rows = input_ids.cpu().numpy()
        if passed is not None and (passed.whole(rows.shape[1]) or passed.states.shape[1] > BEFORE):
            known, there = self._of_pass(rows, passed)
        else:
            known, there = self._of_step_before(rows)
        self._known, self._there, self._scores = known, there, scores
        self._rows = {row.tobytes(): place for place, row in enumerate(rows)}
        newest = rows[:, : -BEFORE - 1 : -1]
        found = np.zeros((len(rows), BEFORE))
        found[:, : newest.shape[1]] = counts[self._ids(newest)]
        return np.concatenate([known, found * there], axis=1, dtype=np.float32)

    def _of_pass(self, rows: npt.NDArray[np.int64], passed: "_Passed") -> tuple[Floats, Floats]:
        known, there = np.zeros((2, len(rows), BEFORE))
        count, real = passed.states.shape[1], passed.real
        there[:, : min(count, BEFORE)] = real[:, ::-1][:, :BEFORE]
        if count > 1:
            states = passed.states[:, :-1]
            full = self._log_probs(states.flatten(0, 1))
            tokens = torch.from_numpy(self._ids(rows[:, 1 - count :])).to(full.device)
            picked = full.gather(1, tokens.reshape(-1, 1)).view(len(rows), -1).double().cpu().numpy()
            # A token has a probability where the token before it is one of the text.
            known[:, : count - 1] = np.where(real[:, :-1], np.maximum(picked, LEAST), 0.0)[:, ::-1]
        return known, there

    def _of_step_before(self, rows: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        places = [self._rows.get(row.tobytes(), -1) for row in np.ascontiguousarray(rows[:, :-1])]
        if min(places, default=0) < 0:
            raise DistlmError(
                "KnnLogitsProcessor: λ by the gate needs the tokens before, and these rows neither begin a generation "
                "nor follow those of the last step; give whole prompts, one generation at a time"
            )
        place = torch.tensor(places, device=self._scores.device)
        newest = torch.from_numpy(rows[:, -1]).to(place)
        drawn_from = self._scores.index_select(0, place).float()
        picked = drawn_from.gather(1, newest[:, None])[:, 0] - drawn_from.logsumexp(dim=1)
        log_probs = np.maximum(picked.double().cpu().numpy(), LEAST)
        known = np.concatenate([log_probs[:, None], self._known[places, :-1]], axis=1)
        return known, np.concatenate([np.ones((len(rows), 1)), self._there[places, :-1]], axis=1)


@dataclass(frozen=True)
class _Passed:
    """The end of one forward pass."""

    states: Tensor
    """[B, n, D]: what the head is given at the last n ≤ BEFORE + 1 tokens."""
    real: npt.NDArray[np.bool_]
    """bool [B, n]: they are tokens, not padding."""
    length: int
    """Tokens of each row in this pass."""

    def whole(self, length: int) -> bool:
        """It was over rows of `length` tokens from their beginning."""
        return self.length == length


def _keep(passed: list[_Passed]) -> Callable[..., None]:
    def hook(_module: nn.Module, _given: Any, named: dict[str, Any], made: Any) -> None:
        states = made[0].detach()
        kept = states[:, -BEFORE - 1 :]
        mask = named.get("attention_mask")
        if torch.is_tensor(mask) and mask.dim() == 2:
            real = mask[:, -kept.shape[1] :].cpu().numpy() != 0
        else:
            real = np.ones(kept.shape[:2], np.bool_)
        # A copy: the states of a long prompt are not kept with it.
        passed[:] = [_Passed(kept.clone(), real, states.shape[1])]

    return hook
