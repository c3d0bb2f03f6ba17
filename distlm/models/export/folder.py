"""A folder that is whole or not there, and what every exported model has in it.

FOLDER/
  config.json                  Hugging Face's; with a memory, and for models of our own, model_type is ours
  modeling_distlm.py           the code of such models (auto_map in config.json names its classes)
  model*.safetensors           weights, values of memories included (distlm.models.export.weights)
  tokenizer.json ...           the tokenizer, where there is one
  README.md                    model card
  distlm.json                  ExportManifest, written last
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.errors import DistlmError
from distlm.models.complete import listing
from distlm.models.export.records import ExportManifest
from distlm.runtime.files import read_json, sync_file, sync_folder
from distlm.runtime.rundir import code_version
from distlm.system_errors import told

MODELING = "modeling_distlm"
"""Module of the code that lies in the folder."""
OURS = "distlm_"
"""What model_type begins with where transformers does not know the architecture."""
CONFIG, CARD = "config.json", "README.md"


@dataclass(frozen=True)
class Code:
    """The classes of a model that transformers does not have."""

    source: str
    """The module that has them."""
    model_type: str
    config_class: str
    model_classes: Mapping[str, str]
    """Class of transformers that loads it, e.g. AutoModelForCausalLM → class in the module."""

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of a model with these settings."""
        classes = {"AutoConfig": self.config_class, **self.model_classes}
        return {
            **{key: value for key, value in settings.items() if key not in ("transformers_version", "_name_or_path")},
            "architectures": [*self.model_classes.values()],
            "model_type": self.model_type,
            "auto_map": {auto: f"{MODELING}.{name}" for auto, name in classes.items()},
            "dtype": "float32",
        }

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """config.json and the module."""
        text = json.dumps(self.config(settings), indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, "utf-8")
        (folder / f"{MODELING}.py").write_text(self.source, "utf-8")


def write_export(folder: Path, kind: str, fill: Callable[[Path], None]) -> None:
    """Write a folder: `fill` writes all of it but the manifest, into a folder that is renamed at the end.

    Raises DistlmError when the folder exists and is not empty, and when it cannot be written.
    """
    with _new_folder(folder) as temporary:
        fill(temporary)
        files = listing(sorted(temporary.glob("*.safetensors")))
        ExportManifest(kind=kind, code=code_version(), files=files).write(temporary / ExportManifest.NAME)


def plain_config(folder: Path) -> dict[str, Any] | None:
    """config.json of an exported folder whose architecture is ours, as that of the one it is made from; None: it has
    another, or there is none."""
    path = folder / CONFIG
    found = read_json(path, "Hugging Face's configuration") if path.is_file() else {}
    if not isinstance(found, dict) or not str(found.get("model_type", "")).startswith(OURS):
        return None
    rest = {key: value for key, value in found.items() if key not in ("memory", "auto_map")}
    return rest | {"model_type": found["model_type"].removeprefix(OURS)}


def require_new(folder: Path) -> Path:
    """The folder itself, links followed. Raises DistlmError when there is something in it."""
    # It may be "." or a link.
    final = Path(os.path.realpath(folder))
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise DistlmError(f"{folder}: {'not empty' if final.is_dir() else 'a file'}; give another folder, or remove it")
    return final


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Another folder beside it, which gets its name when the block ends without an error."""
    final = require_new(folder)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        # A killed export has left it.
        shutil.rmtree(temporary, ignore_errors=True)
        with told(folder, temporary):
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.iterdir():
                sync_file(path)
            sync_folder(temporary)
            temporary.rename(final)
            try:
                sync_folder(final.parent)
            except OSError:
                # What is there would be refused by the same command.
                final.rename(temporary)
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
