"""λ of each token by a run's gate, from what is known before its search (He et al. 2021)."""

import threading
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
        """λ of each token: fp64 [n], 0 for those that are skipped. `queries` [n, D] as they are searched for
        (Retriever.queries), `others` fp32 [n, 2 · BEFORE] as gate.Features."""
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
    found again by its tokens. The hook stands on the model until `close`, or until this object is gone. Each thread
    has its own.
    """

    def __init__(self, hf: Any, log_probs: Callable[[Tensor], Tensor], ids: Callable[[Any], Any]) -> None:
        """`hf`: the model that generates; `log_probs`: its states [n, D] → ln p fp32 [n, V] of each id of the
        dictionary; `ids`: the tokenizer's ids → the dictionary's, int64, the same shape; <unk> of those that it has
        not, as models have rows beyond their tokenizer."""
        self._log_probs, self._ids = log_probs, ids
        self._own = _Own()
        hook = hf.base_model.register_forward_hook(_keep(self._own), with_kwargs=True)
        self.close = weakref.finalize(self, hook.remove)

    @torch.no_grad()
    def others(self, input_ids: Tensor, scores: Tensor, counts: Floats) -> npt.NDArray[np.float32]:
        """fp32 [B, 2 · BEFORE] of the tokens that follow input_ids [B, T], whose scores of the model are [B, V].

        Raises DistlmError where the rows are neither those of the pass over a prompt nor follow those of the last step.
        """
        passed, self._own.passed = self._own.passed, None
        rows = input_ids.cpu().numpy()
        if not rows.shape[1]:
            raise DistlmError(
                "KnnLogitsProcessor: λ by the gate needs the tokens before; give `generate` input_ids, not embeddings"
            )
        if passed is not None and len(passed.states) == len(rows) and passed.ends(rows.shape[1]):
            known, there = self._of_pass(rows, passed)
        else:
            known, there = self._of_step_before(rows)
        self._own.known, self._own.there, self._own.scores = known, there, scores.detach()
        self._own.rows = {row.tobytes(): place for place, row in enumerate(rows)}
        newest = rows[:, : -BEFORE - 1 : -1]
        found = np.zeros((len(rows), BEFORE))
        found[:, : newest.shape[1]] = counts[self._ids(newest)]
        return np.concatenate([known, found * there], axis=1, dtype=np.float32)

    def _of_pass(self, rows: npt.NDArray[np.int64], passed: "_Passed") -> tuple[Floats, Floats]:
        known, there = np.zeros((2, len(rows), BEFORE))
        count, real = passed.states.shape[1], passed.real
        there[:, : min(count, BEFORE)] = real[:, ::-1][:, :BEFORE]
        if count > 1:
            full = self._log_probs(passed.states[:, :-1].flatten(0, 1))
            tokens = torch.from_numpy(self._ids(rows[:, 1 - count :])).to(full.device)
            picked = full.gather(1, tokens.reshape(-1, 1)).view(len(rows), -1).double().cpu().numpy()
            # A token has a probability where the token before it is one of the text.
            known[:, : count - 1] = np.where(real[:, :-1], np.maximum(picked, LEAST), 0.0)[:, ::-1]
        return known, there

    def _of_step_before(self, rows: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        own = self._own
        places = [own.rows.get(row.tobytes(), -1) for row in np.ascontiguousarray(rows[:, :-1])]
        if min(places, default=0) < 0:
            raise DistlmError(
                "KnnLogitsProcessor: λ by the gate needs the tokens before, and these rows neither begin a generation "
                "nor follow those of the last step; give whole prompts, one generation at a time"
            )
        place = torch.tensor(places, device=own.scores.device)
        newest = torch.from_numpy(rows[:, -1]).to(place)
        drawn_from = own.scores.index_select(0, place).float()
        picked = drawn_from.gather(1, newest[:, None])[:, 0] - drawn_from.logsumexp(dim=1)
        log_probs = np.maximum(picked.double().cpu().numpy(), LEAST)
        known = np.concatenate([log_probs[:, None], own.known[places, :-1]], axis=1)
        return known, np.concatenate([np.ones((len(rows), 1)), own.there[places, :-1]], axis=1)


@dataclass(frozen=True)
class _Passed:
    """The end of a text that went through the model, in one pass or in several."""

    states: Tensor
    """[B, n, D]: what the head is given at the last n ≤ BEFORE + 1 tokens."""
    real: npt.NDArray[np.bool_]
    """bool [B, n]: they are tokens, not padding."""
    length: int
    """Tokens of each row that went through."""

    def ends(self, length: int) -> bool:
        """It says all that there is to know of rows of `length` tokens."""
        return self.length == length or self.states.shape[1] > BEFORE

    def then(self, other: "_Passed") -> "_Passed":
        """Both, one behind the other."""
        states = torch.cat([self.states, other.states], dim=1)[:, -BEFORE - 1 :]
        real = np.concatenate([self.real, other.real], axis=1)[:, -BEFORE - 1 :]
        return _Passed(states, real, self.length + other.length)


class _Own(threading.local):
    """Of one thread: the pass that was not read yet, and the step before."""

    def __init__(self) -> None:
        self.passed: _Passed | None = None
        self.rows: dict[bytes, int] = {}
        """The rows by their tokens."""
        self.known, self.there = np.zeros((2, 0, BEFORE))
        """fp64 [B, BEFORE]: ln p of the tokens before, and 1 where there is such a token, else 0."""
        self.scores = torch.zeros(0)
        """[B, V]: what the next tokens were drawn from."""


def _keep(own: _Own) -> Callable[..., None]:
    def hook(_module: nn.Module, _given: Any, named: dict[str, Any], made: Any) -> None:
        states = made[0].detach()
        length = states.shape[1]
        # A copy: the states of a long prompt are not kept with it.
        kept = states[:, -BEFORE - 1 :].clone()
        mask, before = _mask(named.get("attention_mask"), length)
        real = np.ones(kept.shape[:2], np.bool_) if mask is None else mask[:, -kept.shape[1] :]
        passed = _Passed(kept, np.broadcast_to(real, kept.shape[:2]), length)
        # A prompt that comes in parts: this pass goes on where one that was not read has ended.
        goes_on = own.passed is not None and before == own.passed.length and len(own.passed.states) == len(kept)
        own.passed = own.passed.then(passed) if own.passed is not None and goes_on else passed

    return hook


def _mask(given: Any, length: int) -> tuple[npt.NDArray[np.bool_] | None, int]:
    """Which of the last `length` positions are tokens, bool [B, length]; None: all. And how many positions lie before
    them, 0 where that is not known.

    `given`: [B, positions], 0 for padding; or what attention is given, [B or 1, heads or 1, length, columns], True or 0
    where it may look, of a cache that may be longer than the text; or such ones by the kind of layer. Raises
    DistlmError for another.
    """
    if given is None:
        return None, 0
    if isinstance(given, dict):
        given = given.get("full_attention", next(iter(given.values()), None))
        return _mask(given, length)
    if torch.is_tensor(given) and given.dim() == 2:
        return given[:, -length:].cpu().numpy() != 0, given.shape[1] - length
    if torch.is_tensor(given) and given.dim() == 4 and given.shape[2] == length:
        # Each position sees itself, unless it is padding, which then sees nothing, or what is as good as nothing.
        seen = given[:, 0] if given.dtype == torch.bool else given[:, 0] >= 0
        last = seen[:, -1]
        end = int(last.any(dim=0).nonzero().max()) + 1 if bool(last.any()) else length
        return last[:, end - length : end].cpu().numpy(), end - length
    raise DistlmError(
        f"KnnLogitsProcessor: λ by the gate reads which positions are padding from the attention mask, and this one is "
        f"a {type(given).__name__}; load the model with attn_implementation='sdpa' or 'eager', or take mixture='knn'"
    )
