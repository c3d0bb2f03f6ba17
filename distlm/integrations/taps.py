"""The hidden state of a Hugging Face model that is the key: which one, and how generation's own pass gives it."""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distlm.errors import DistlmError
from distlm.models.hf.description import OUTPUT
from distlm.models.hf.memory import lists_of_text

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "fc1")
"""Names that the feed-forward part of a layer has in transformers; where it is no module of its own, its first map."""


def default_tap(hf: Any) -> str:
    """The input of the last layer's feed-forward part, behind its layer norm (the key of Khandelwal et al. 2020,
    section 5); "output", what the softmax is given, where no such module can be told by its name."""
    lists = lists_of_text(hf)
    layers = getattr(hf.config.get_text_config(), "num_hidden_layers", None)
    chosen = [name for name, module in lists.items() if len(module) == layers] or list(lists)
    if not chosen:
        return OUTPUT
    last = f"{chosen[0]}.{len(lists[chosen[0]]) - 1}"
    inside = [name for name, _ in hf.get_submodule(last).named_modules() if name]
    for wanted in FEED_FORWARD:
        for name in sorted(inside, key=lambda name: name.count(".")):
            if name.rpartition(".")[2] == wanted:
                return f"{last}.{name}:input"
    return OUTPUT


class Newest(NamedTuple):
    """What a forward pass said of the last token of each row."""

    state: Tensor
    """[B, D], or [B · T, D] of models that compute on all rows in one."""
    tokens: Tensor | None
    """int64 [B]: the last token; None where the pass was given embeddings."""
    flat: bool
    """It is that of all tokens."""


class NewestStates:
    """Keeps the tapped state of the newest token of every forward pass of a model, until it is taken.

    Hooks stand on the model until `close`, or until this object is gone. Each thread has its own.
    """

    def __init__(self, hf: Any, tap: str) -> None:
        self._own = own = threading.local()
        self._tap = tap
        path, _, side = tap.rpartition(":")
        base = hf.base_model
        module = base if tap == OUTPUT else hf.get_submodule(path)
        begin = base.register_forward_pre_hook(_begin(own), with_kwargs=True)
        if side == "input":
            hook = module.register_forward_pre_hook(_keep_given(own), with_kwargs=True)
        else:
            hook = module.register_forward_hook(_keep_made(own))
        self.close = weakref.finalize(self, _remove, begin, hook)

    def take(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """State [rows, D] and last tokens int64 [rows] of this thread's last pass, once.

        Raises DistlmError where there was none since the last `take`, or one of another number of rows.
        """
        newest: Newest | None = getattr(self._own, "newest", None)
        self._own.newest = None
        if newest is None:
            raise DistlmError(
                "KnnLogitsProcessor: the model of its KnnLM made no forward pass for these scores: give it to "
                "`generate` of that model, without an assistant model, or make a KnnLM round the model that generates"
            )
        state = newest.state
        if newest.flat and rows and len(state) % rows == 0:
            state = state.reshape(rows, -1, state.shape[1])[:, -1]
        if state.dim() != 2 or len(state) != rows:
            raise DistlmError(
                f"KnnLogitsProcessor: scores of {rows} rows, and tap={self._tap!r} gave a state of "
                f"{list(newest.state.shape)}: another model generates, or the tap is not one state per token"
            )
        return state, newest.tokens


def _begin(own: Any) -> Callable[..., None]:
    def hook(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", given[0] if given else None)
        own.tokens = ids[:, -1] if torch.is_tensor(ids) and ids.dim() == 2 and not ids.is_floating_point() else None

    return hook


def _keep_given(own: Any) -> Callable[..., None]:
    return lambda _module, given, named: _keep(own, [*given, *named.values()])


def _keep_made(own: Any) -> Callable[..., None]:
    def hook(_module: nn.Module, _given: Any, made: Any) -> None:
        _keep(own, [made] if torch.is_tensor(made) else [made[0]])

    return hook


def _keep(own: Any, found: list[Any]) -> None:
    states = (item for item in found if torch.is_tensor(item) and item.is_floating_point())
    state = next(states, None)
    if state is not None:
        # Copied, so that the states of a long prompt are not kept with it.
        flat = state.dim() != 3
        kept = state.detach() if flat else state[:, -1].detach().clone()
        own.newest = Newest(kept, getattr(own, "tokens", None), flat)


def _remove(*hooks: Any) -> None:
    for hook in hooks:
        hook.remove()
