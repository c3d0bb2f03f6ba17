"""The kinds of language model there are, chosen by `model.kind`: their configuration, class and tap points."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distlm.config.schema import LstmConfig, ModelConfig, RunConfig
from distlm.errors import DistlmError
from distlm.finetune.model import TaskModel, TaskModelConfig
from distlm.models.awd_lstm import model as awd_lstm
from distlm.models.awd_lstm.model import AwdLstm
from distlm.models.empty import empty_model, nothing_drawn
from distlm.models.hf import model as hf
from distlm.models.hf.model import HfLM, HfModel
from distlm.models.plm.model import Plm, PlmModel, plm_model, values_to_come
from distlm.models.transformer import model as transformer_lm
from distlm.models.transformer.model import TransformerLM

CausalConfig = ModelConfig | LstmConfig | HfModel
AnyModelConfig = CausalConfig | PlmModel | TaskModelConfig


@dataclass(frozen=True)
class Kind:
    """One kind of model. `build` takes (configuration, size of the dictionary)."""

    name: str
    config: type
    build: Callable[[Any, int], Any]
    taps: tuple[str, ...] = ()
    """Hidden states that a datastore can hold, where all models of the kind have the same ones."""


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("transformer_lm", ModelConfig, TransformerLM, transformer_lm.TAPS),
        Kind("awd_lstm", LstmConfig, AwdLstm, awd_lstm.TAPS),
        Kind("hf", HfModel, HfLM),
        Kind("plm", PlmModel, Plm),
        Kind("plm_task", TaskModelConfig, TaskModel),
    )
}


def model_config(config: RunConfig) -> AnyModelConfig:
    """The section of the configuration that describes the model; of one of Hugging Face, what its folder says."""
    if config.model.kind == "plm":
        return plm_model(config.plm, config.memory, config.train.seed)
    if config.model.kind == "hf":
        return hf.hf_model(config.hf.name)
    return config.lstm if config.model.kind == "awd_lstm" else config.model


def causal(config: AnyModelConfig) -> CausalConfig:
    """The same, of a model that predicts the next word. Raises DistlmError for a masked language model."""
    if isinstance(config, ModelConfig | LstmConfig | HfModel):
        return config
    raise DistlmError(
        "a masked language model reads both sides of a word: it has no datastore, neighbours or cache; those are for "
        "model.kind=transformer_lm, awd_lstm and hf"
    )


def require_tap(config: CausalConfig, tap: str, key: str) -> None:
    """Raises DistlmError, naming the setting `key` and the choices, when the model has no hidden state `tap`."""
    if isinstance(config, HfModel):
        hf.require_tap(config, tap, key)
    elif tap not in (taps := kind_of(config).taps):
        raise DistlmError(f"{key}={tap!r}: no such hidden state; choose one of {', '.join(taps)}")


def inner_width(config: CausalConfig) -> int:
    """Width of the widest layer."""
    if isinstance(config, HfModel):
        return 4 * config.width
    return config.hidden_width if isinstance(config, LstmConfig) else config.ffn_width


def kind_of(config: AnyModelConfig) -> Kind:
    """The kind that a model's configuration belongs to."""
    return next(kind for kind in KINDS.values() if isinstance(config, kind.config))


def build_model(config: AnyModelConfig, vocabulary: int) -> Any:
    """A freshly initialised model over a dictionary of `vocabulary` words."""
    return kind_of(config).build(config, vocabulary)


def model_on_meta(config: AnyModelConfig, vocabulary: int) -> Any:
    """The model without memory for its parameters."""
    if isinstance(config, PlmModel):
        config = dataclasses.replace(config, memory=values_to_come(config.memory))
    with empty_model():
        return build_model(config, vocabulary)


def model_for_weights(config: AnyModelConfig, vocabulary: int) -> Any:
    """The model, without memory for its parameters where that can be; every parameter is yet to be assigned."""
    if isinstance(config, HfModel):
        # Rotary angles and the like are buffers, computed when the model is built.
        with nothing_drawn():
            return build_model(config, vocabulary)
    return model_on_meta(config, vocabulary)


def parameter_count(config: AnyModelConfig, vocabulary: int) -> int:
    """Parameters of the model, shared ones counted once; allocates nothing."""
    return sum(parameter.numel() for parameter in model_on_meta(config, vocabulary).parameters())


def card_config(card: Mapping[str, Any]) -> AnyModelConfig:
    """The model's configuration from model.json. Raises TypeError for keys that this version does not know."""
    found: AnyModelConfig = KINDS[card["kind"]].config(**card["config"])
    return found


def describe(config: AnyModelConfig, vocabulary: int) -> dict[str, Any]:
    """The head of model.json: kind, configuration and vocabulary; for an AWD-LSTM also which ids its rows are."""
    card = {"kind": kind_of(config).name, "config": dataclasses.asdict(config), "vocabulary": vocabulary}
    if isinstance(config, LstmConfig):
        card |= {"rows": vocabulary - awd_lstm.FIRST_ID, "first_id": awd_lstm.FIRST_ID}
    return card
