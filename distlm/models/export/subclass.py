"""A model class of transformers with memories as code of its own: a subclass under another name and model_type."""

from distlm.models.export.folder import OURS, Code
from distlm.models.export.source import Collector, Place

_TAIL = '''
class {ours_config}({config}):
    """{config} with the settings of the memories."""

    model_type = "{model_type}"
    memory: dict[str, Any] | None = None


class {ours}({mixin}, {model}):
    """{model} with product-key memories at the layers that config.memory names."""

    config_class = {ours_config}
'''


def subclass(mixin: str, model_class: type, config_class: type, auto: str) -> Code:
    """Its code. `mixin`: MODULE:CLASS that gives a model its memories; `auto`: class of transformers that loads it."""
    model, config = model_class.__name__, config_class.__name__
    model_type = f"{OURS}{config_class.model_type}"  # type: ignore[attr-defined]
    collector = Collector({"distlm.errors:DistlmError": "ValueError"}).add([mixin])
    for name in (model, config):
        collector.external("transformers", name)
    tail = _TAIL.format(
        ours=f"Distlm{model}", ours_config=f"Distlm{config}", model=model, config=config, model_type=model_type,
        mixin=Place.of(mixin).name,
    )  # fmt: skip
    header = f"{model} with product-key memories; needs torch and transformers."
    return Code(collector.source(header, tail), model_type, f"Distlm{config}", {auto: f"Distlm{model}"})
