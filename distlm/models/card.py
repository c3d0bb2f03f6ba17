"""model.json, the description of a model in its folder; read without torch."""

from pathlib import Path
from typing import Any

from distlm.errors import DistlmError
from distlm.models.registry import model_names
from distlm.runtime.files import json_hash, read_json

WEIGHTS, CARD = "model.safetensors", "model.json"


def read_model_card(folder: Path) -> dict[str, Any]:
    """Content of model.json. Raises DistlmError when it is missing, cut, incomplete or of another kind of model."""
    path = folder / CARD
    meta = read_json(path, "description of a model; is this a checkpoint folder?")
    if not isinstance(meta, dict) or meta.get("kind") not in model_names():
        kind = meta.get("kind") if isinstance(meta, dict) else meta
        raise DistlmError(f"{path}: kind {kind!r} is unknown; this version reads {', '.join(map(repr, model_names()))}")
    if missing := [key for key in ("config", "vocabulary", "weights", "dictionary") if key not in meta]:
        raise DistlmError(f"{path}: {', '.join(missing)} missing; the file is incomplete, use another checkpoint")
    return meta


def model_fingerprint(folder: Path) -> str:
    """Identifies what the model computes: configuration, dictionary and weights, but not the step it was saved at."""
    meta = read_model_card(folder)
    return json_hash({key: meta[key] for key in ("kind", "config", "vocabulary", "dictionary", "weights")})
