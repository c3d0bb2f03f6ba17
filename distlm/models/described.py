"""Models by their descriptions, whatever their kind: from a configuration or model.json to the model.

Plans read this without torch; what builds a model imports it.
"""

from typing import Any

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError
from distlm.memory.placing import WithMemory
from distlm.models.kind import CausalDescription, Description, Kind
from distlm.models.records import ModelCard
from distlm.models.registry import kind, kind_of, not_causal


def model_of(config: RunConfig) -> Description:
    """The model that a configuration describes. Raises DistlmError when what it names cannot be read."""
    return kind(config.model.kind).describe(config)


def causal(description: Description) -> CausalDescription:
    """The same, of a model that predicts the next word. Raises DistlmError for another one."""
    if isinstance(description, CausalDescription):
        return description
    raise DistlmError(not_causal())


def causal_kind(description: CausalDescription) -> Kind:
    """Its kind."""
    found = kind_of(description)
    assert isinstance(found, Kind)
    return found


def require_tap(description: CausalDescription, tap: str, key: str) -> None:
    """Raises DistlmError, naming the setting `key` and the choices, when the model has no hidden state `tap`."""
    causal_kind(description).require_tap(description, tap, key)


def build_model(description: Description, vocabulary: int) -> Any:
    """A freshly initialised model over a dictionary of `vocabulary` words."""
    return kind_of(description).build(description, vocabulary)


def model_on_meta(description: Description, vocabulary: int) -> Any:
    """The model without memory for its parameters."""
    from distlm.models.empty import empty_model

    found = kind_of(description)
    with empty_model():
        return found.build(found.undrawn(description), vocabulary)


def model_for_weights(description: Description, vocabulary: int) -> Any:
    """The model, without memory for its parameters where that can be; every parameter is yet to be assigned."""
    found = kind_of(description)
    if not (found.computes_buffers or has_memory(description)):
        return model_on_meta(description, vocabulary)
    from distlm.models.empty import nothing_drawn

    with nothing_drawn():
        return found.build(found.undrawn(description), vocabulary)


def has_memory(description: Description) -> bool:
    """Whether the model has a product-key memory; its values are buffers in separate files."""
    return isinstance(description, WithMemory) and bool(description.memory)


def value_bytes(description: CausalDescription) -> int:
    """Bytes of all values of the model's memories, which are no parameters."""
    if not isinstance(description, WithMemory) or not description.memory:
        return 0
    from distlm.memory.of_model import layers_and_values

    return 4 * layers_and_values(description.memory, description.width)[1]


def parameter_count(description: Description, vocabulary: int) -> int:
    """Parameters of the model, shared ones counted once; allocates nothing."""
    return sum(parameter.numel() for parameter in model_on_meta(description, vocabulary).parameters())


def largest_parameter(description: Description, vocabulary: int) -> int:
    """Elements of the model's largest parameter; allocates nothing."""
    return max(parameter.numel() for parameter in model_on_meta(description, vocabulary).parameters())


def model_bytes(description: CausalDescription, vocabulary: int) -> int:
    """Bytes of the fp32 model that a later stage reads: parameters, and values of memories."""
    return 4 * parameter_count(description, vocabulary) + value_bytes(description)


def card_of(description: Description, vocabulary: int, dictionary: str, weights: str, **more: Any) -> ModelCard:
    """The card of a model whose weights have the hash `weights`; `more`: further fields that every kind has."""
    found = kind_of(description)
    more |= found.card_extras(description, vocabulary)
    return (found.card or ModelCard)(
        kind=found.name,
        config=description.recorded(),
        vocabulary=vocabulary,
        dictionary=dictionary,
        weights=weights,
        **more,
    )
