"""Product-key memory in a causal language model of Hugging Face, in place of feed-forward modules or beside them.

No table of model types: the layers are the model's list of modules that have a feed-forward module of one input. A
memory hangs in that module, so that the paths and names of everything else stay those of the model without memory.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.memory.layer import ProductKeyMemory
from distlm.memory.of_model import make_memories
from distlm.memory.placing import placed, require_layers
from distlm.memory.values.exchange import Exchange
from distlm.models.hf.attention import use_row_attention
from distlm.models.hf.description import HfModel
from distlm.models.row_dropout import RowDropout, Rows, memory_dropout

_FFN = ("mlp", "feed_forward", "ffn", "feedforward")
"""What models of Hugging Face call the feed-forward module of a layer."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""And the number of their layers."""

Given = Callable[[], tuple[Any, ...]]
"""What a memory is given beside x."""


@dataclass(frozen=True)
class Equipped:
    """The memories of a model."""

    rows: Rows
    """What they and the dropout must know of a batch."""
    memories: dict[int, ProductKeyMemory]
    """Layer, counted from 1 → its memory."""
    ffn_names: dict[int, tuple[str, ...]]
    """Layer → how the names of its feed-forward module's parameters begin, below the model."""


def with_memory(model: HfModel, memory: MemoryConfig, seed: int) -> HfModel:
    """The description of the same model with the section `memory`. Raises UsageError for layers that it has not."""
    text = model.backbone.get("text_config") or model.backbone
    layers = next((int(text[key]) for key in _COUNTS if text.get(key)), 0)
    found = placed(memory, layers)
    if found and layers:
        require_layers(found["positions"], layers)
    return replace(model, memory=found, seed=seed)


def equip(hf: Any, memory: Mapping[str, Any], width: int, seed: int, exchange: Exchange | None) -> Equipped:
    """Give the layers of `memory` (MemoryConfig, not empty) fresh memories, and the model dropout masks by row.

    `exchange` joins the ranks that train them; None: this process has all. Raises DistlmError for a model without
    feed-forward modules of one input, UsageError for layers that it has not.
    """
    config, rows = MemoryConfig(**memory), Rows()
    path, name, layers = layers_of(hf)
    require_layers(config.positions, len(layers))
    for place, module in list(hf.named_modules()):
        if type(module) is nn.Dropout:
            parent, _, child = place.rpartition(".")
            setattr(hf.get_submodule(parent), child, RowDropout(module.p, rows, place))
    use_row_attention(hf, rows)
    made = make_memories(config, width, seed, exchange, partial(memory_dropout, rows))
    for position, found in made.items():
        add_memory(layers[position - 1], name, found, asdict(config), rows.of_text)
    names: dict[int, tuple[str, ...]] = {n: (f"{path}.{n - 1}.{name}.",) for n in range(1, len(layers) + 1)}
    return Equipped(rows, made, names)


def add_memory(layer: Any, name: str, memory: nn.Module, settings: Mapping[str, Any], given: Given) -> None:
    """Give a layer, whose feed-forward module is called `name`, its memory, by `settings`: kind (pkm: in place of that
    module, resm: beside it), alpha, beta.

    In each forward pass the memory is called with x [B, T, D] and what `given` returns.
    """
    if settings["kind"] == "pkm":
        setattr(layer, name, MemoryFfn(memory, settings["beta"], given))
        return
    ffn = getattr(layer, name)
    ffn.memory = memory
    ffn.register_forward_hook(partial(_beside, settings["alpha"], settings["beta"], given), with_kwargs=True)


class MemoryFfn(nn.Module):
    """β·PKM(x) in the place of a feed-forward module."""

    def __init__(self, memory: nn.Module, beta: float, given: Given) -> None:
        super().__init__()
        self.memory, self.beta, self.given = memory, beta, given

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x [B, T, D] → the same shape."""
        read: Tensor = self.beta * self.memory(x, *self.given())
        return read


def _beside(
    alpha: float, beta: float, given: Given, ffn: Any, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any
) -> Tensor:
    """α·FFN(x) + β·PKM(x)."""
    if not isinstance(output, Tensor):
        raise DistlmError(
            f"memory.kind=resm: the feed-forward module {type(ffn).__name__} gives more than a tensor (a mixture of "
            "experts?); use memory.kind=pkm, or another model"
        )
    x = inputs[0] if inputs else next(iter(named.values()))
    # Last, so that a memory of zeros leaves the dense model's bits.
    total: Tensor = alpha * output + beta * ffn.memory(x, *given())
    return total


def lists_of_text(hf: Any) -> dict[str, nn.ModuleList]:
    """Path → each list of modules, not empty, in the part of a model that reads text: others read images or sound."""
    inside = {id(module) for module in hf.get_decoder().modules()}
    lists = {path: module for path, module in hf.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    return {path: module for path, module in lists.items() if id(module) in inside}


def layers_of(hf: Any) -> tuple[str, str, nn.ModuleList]:
    """Path of the model's list of layers, name of the feed-forward module in each, and the list."""
    for path, module in lists_of_text(hf).items():
        name = next((name for name in _FFN if all(_takes_one(getattr(layer, name, None)) for layer in module)), "")
        if name:
            return path, name, module
    kind = getattr(getattr(hf, "config", None), "model_type", type(hf).__name__)
    raise DistlmError(
        f"memory.kind: a {kind}, whose layers have no feed-forward module of one input ({', '.join(_FFN)}); memories "
        "are for models that have one, as GPT-2, Llama and most others; set memory.kind=none"
    )


def _takes_one(module: Any) -> bool:
    if not isinstance(module, nn.Module):
        return False
    forward: Callable[..., Any] = module.forward
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [item for item in inspect.signature(forward).parameters.values() if item.kind in kinds]
    return sum(item.default is inspect.Parameter.empty for item in parameters) == 1
