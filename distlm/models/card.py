"""model.json, the description of a model in its folder; read without torch."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import msgspec

from distlm.errors import DistlmError
from distlm.memory.config import MemoryConfig
from distlm.models.complete import memory_files
from distlm.models.kind import CausalDescription, Description
from distlm.models.records import ModelCard
from distlm.models.registry import model_kind, model_names
from distlm.runtime.files import json_hash, read_json

WEIGHTS, CARD = "model.safetensors", "model.json"


def read_model_card(folder: Path) -> ModelCard:
    """Content of model.json. Raises DistlmError when it is missing, cut, incomplete or of another kind of model, and
    for a configuration that its kind cannot read."""
    path = folder / CARD
    meta = read_json(path, f"{ModelCard.WHAT}; is this a checkpoint folder?")
    if not isinstance(meta, dict) or meta.get("kind") not in model_names():
        kind = meta.get("kind") if isinstance(meta, dict) else meta
        raise DistlmError(f"{path}: kind {kind!r} is unknown; this version reads {', '.join(map(repr, model_names()))}")
    if missing := [key for key in ("config", "vocabulary", "weights", "dictionary") if key not in meta]:
        raise DistlmError(f"{path}: {', '.join(missing)} missing; the file is incomplete, use another checkpoint")
    card = (model_kind(meta["kind"]).card or ModelCard).of_file(meta, path)
    try:
        model_of_card(card)
    except msgspec.ValidationError as error:
        raise DistlmError(f"{path}: config: not a {card.kind} of this version of distlm: {error}") from error
    return card


def model_of_card(card: ModelCard) -> Description:
    """The model that model.json describes. Raises msgspec.ValidationError for keys that its kind does not know and
    for values of another type; a card that was read has none."""
    kind = model_kind(card.kind).description_for(card.config)
    _refuse_unknown(card.config, kind)
    model = msgspec.convert(card.config, kind)
    # Kept as it was written: settings that came later have their defaults, in what the model is too.
    memory = getattr(model, "memory", None)
    if isinstance(memory, dict):
        _refuse_unknown(memory, MemoryConfig, "memory.")
        try:
            msgspec.convert(memory, MemoryConfig)
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(f"memory: {error}") from error
    return model


def _refuse_unknown(tree: Mapping[str, object], kind: type, place: str = "") -> None:
    if unknown := tree.keys() - {field.name for field in fields(kind)}:
        raise msgspec.ValidationError(f"Object contains unknown field `{place}{min(unknown)}`")


def model_fingerprint(folder: Path) -> str:
    """Identifies what the model computes: configuration, dictionary and weights, but not the step it was saved at.

    Of a model that predicts the next word with its memories' files; those of a masked language model stand apart.
    """
    card = read_model_card(folder)
    facts = {key: getattr(card, key) for key in ("kind", "config", "vocabulary", "dictionary", "weights")}
    if isinstance(model_of_card(card), CausalDescription) and card.config.get("memory"):
        facts["memory"] = memory_files(folder)
    return json_hash(facts)
