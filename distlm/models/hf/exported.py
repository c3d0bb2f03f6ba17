"""Folders of `distlm export hf` as hf.name: which of them are no model for it, and what to do instead."""

from collections.abc import Mapping
from typing import Any

from distlm.errors import DistlmError
from distlm.models.export.folder import OURS


def refuse_exported(name: str, config: Mapping[str, Any]) -> None:
    """Raises DistlmError for the config.json of a model that distlm has exported with code of its own: one with a
    memory, or one over words. One without is a model as any other."""
    kind = str(config.get("model_type", ""))
    if not kind.startswith(OURS):
        return
    from transformers import CONFIG_MAPPING

    plain = kind.removeprefix(OURS)
    if "AutoModelForCausalLM" not in (config.get("auto_map") or {}):
        raise DistlmError(f"hf.name={name}: an exported {plain}, no causal language model; name a causal model")
    if plain not in CONFIG_MAPPING:
        raise DistlmError(
            f"hf.name={name}: an exported {plain}, which is a model over words, and model.kind=hf has sub-words; go on "
            f"from its run instead: model.kind={plain} train.init_from=RUN, with the settings of the model as there"
        )
    raise DistlmError(
        f"hf.name={name}: a {plain} exported with its product-key memory, which is not read from there; go on from its "
        "run instead: train.init_from=RUN, with hf.name and memory.* as there"
    )
