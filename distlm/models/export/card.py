"""README.md of an exported model: what it is, what the run's records say of it, how it was trained, how to load it.

Nothing in it is made up: figures and settings are those of the run's files, and what they do not say is left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from msgspec import UNSET

from distlm.config.load import leaf_fields
from distlm.config.schema import RunConfig
from distlm.config.yaml_files import recorded_settings
from distlm.errors import DistlmError
from distlm.knnlm.evaluate.records import Results
from distlm.knnlm.evaluate.table import results_table
from distlm.models.card import model_fingerprint, read_model_card
from distlm.models.complete import memory_files
from distlm.models.export.folder import CARD
from distlm.runtime.rundir import RunDir, code_version, stage_sections
from distlm.training.finished import RESULT, lm_table
from distlm.training.records import LmResults

_TASKS = {
    "AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification", "AutoModelForQuestionAnswering": "question-answering",
}  # fmt: skip
_NEIGHBOURS = "The datastore is no part of this folder; the language model alone is."
_HEAD = """---
# license: the author's to name, e.g. apache-2.0
library_name: transformers
pipeline_tag: {task}
tags:
- distlm
---

"""


@dataclass(frozen=True)
class Card:
    """The parts of a card; Markdown each, empty: left out."""

    name: str
    """Of the run."""
    what: str
    """The model, in words."""
    results: str
    training: str
    use: str = ""
    """What to know for using it."""

    def write(self, folder: Path, called: str, auto: str, own_code: bool) -> None:
        """Write it for the class of transformers `auto`; `called`: the folder's name. `own_code`: the model's code lies
        in the folder."""
        parts = [
            f"# {self.name}",
            self.what,
            "## Use",
            _loading(called, auto, own_code),
            self.use,
            "## Results",
            self.results or "The run has no results of this checkpoint.",
            "## Training",
            self.training,
            "## Licence",
            "Not stated: it is the author's to name, here and in `license:` above.",
        ]
        text = _HEAD.format(task=_TASKS[auto]) + "\n\n".join(part for part in parts if part) + "\n"
        (folder / CARD).write_text(text, "utf-8")


def run_card(config: RunConfig, checkpoint: Path, what: str, use: str = "") -> Card:
    """The card of a run's checkpoint. Raises DistlmError for records that cannot be read."""
    run = RunDir.of(config)
    parts = [_of_model(run, checkpoint), *_with_neighbours(run, checkpoint)]
    return Card(config.name, what, "\n\n".join(part for part in parts if part), training(config, run, checkpoint), use)


def training(config: RunConfig, run: RunDir, checkpoint: Path) -> str:
    """Updates, code, and the settings that decided the checkpoint, as the run recorded them."""
    card, code = read_model_card(checkpoint), code_version()
    lines = [f"Trained for {card.step:,} updates with distlm." if card.step else ""]
    if card.imported_from is not UNSET:
        lines = [f"Imported from {Path(card.imported_from).name}; {card.step or 0:,} updates with distlm since."]
    recorded = run.root / "configs" / "train.yaml"
    if recorded.is_file():
        tree = recorded_settings(recorded)
        lines += ["", "Settings:", "", fenced(yaml.safe_dump(_deciding(tree, config), sort_keys=False), "yaml")]
    lines += ["", f"Exported by distlm {code.distlm}{f' ({code.git})' if code.git else ''}."]
    return "\n".join(lines).strip()


def fenced(text: str, language: str = "text") -> str:
    """A block of text as it is."""
    return f"```{language}\n{text.rstrip()}\n```"


def _loading(called: str, auto: str, own_code: bool) -> str:
    trust = ", trust_remote_code=True" if own_code else ""
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{called}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{called}"{trust})',
    ]
    found = fenced("\n".join(lines), "python")
    if own_code:
        found += "\n\nThe model's code is `modeling_distlm.py` in this folder: it needs torch and transformers alone."
    return found


def _of_model(run: RunDir, checkpoint: Path) -> str:
    """lm.json, where it was made with this checkpoint."""
    path = run.root / RESULT
    if not path.is_file():
        return ""
    results = LmResults.read(path)
    memory = results.model.memory_files or {}
    same = results.model.fingerprint == model_fingerprint(checkpoint)
    if not same or (memory and memory != memory_files(checkpoint)):
        return ""
    return fenced(lm_table(results))


def _with_neighbours(run: RunDir, checkpoint: Path) -> list[str]:
    """Results of kNN-LM with this checkpoint."""
    found = []
    for label, path in run.all_results().items():
        try:
            results = Results.read(path)
        except DistlmError:
            # Of another version; the card is not the place to say so.
            continue
        if results.model.fingerprint == model_fingerprint(checkpoint):
            found.append(f"With neighbours or cache ({label}):\n\n{fenced(results_table(results))}")
    return [*found, _NEIGHBOURS] if found else []


def _deciding(tree: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Settings that decided the checkpoint. Of a path only the last part: the rest is the author's own."""
    found: dict[str, Any] = {}
    sections = stage_sections("train", config.model.kind)
    for key, item in leaf_fields(type(config)).items():
        section, _, name = key.partition(".")
        if section not in sections or item.metadata.get("volatile") or name not in tree.get(section, {}):
            continue
        value = tree[section][name]
        found.setdefault(section, {})[name] = Path(value).name if isinstance(value, str) and "/" in value else value
    return found
