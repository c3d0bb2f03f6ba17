"""Predictions of a fine-tuned model, as files.

PLACE/predictions/{dev,test}/
  TASK.tsv            GLUE's submission: index and prediction, under the benchmark's names (MNLI-m, MNLI-mm, AX)
  predictions.json    SQuAD's: id of each question → answer
  NAME.logits.npy     fp32 [n, labels], of a regression [n, 1]; SQuAD [windows, 4, 20]: scores of the best beginnings,
                      of the best ends, and their places in the row
  NAME.ids.npy        [n] the id of each row of it, as text
  manifest.json       which model and data they belong to; written last

Each of the two is written under another name and renamed, so it is whole or not there.
"""

import json
import shutil
from pathlib import Path

from distlm.errors import DistlmError
from distlm.finetune.data import PARTS, Outputs, Predictions, TaskData
from distlm.finetune.records import PredictionFiles
from distlm.models.complete import listing
from distlm.models.plm.config import FinetuneConfig
from distlm.runtime.files import save_array, sync_file, sync_folder
from distlm.runtime.progress import say
from distlm.system_errors import told

FOLDER = "predictions"


def write_all(place: Path, task: TaskData, outputs: Outputs, model: str, kept: frozenset[str] = frozenset()) -> None:
    """Write the predictions below `place` for dev, and for test where there is one, but for the parts of `kept`.

    outputs: of every split, in the order of its rows. `model`: fingerprint. What an unfinished start has left there is
    replaced. Rank 0 alone. Raises DistlmError when the disk is full.
    """
    for part in PARTS:
        if task.splits(part) and part not in kept:
            rows = sum(map(len, task.splits(part).values()))
            say(f"finetune: predictions for {part} ({rows} rows): {place / FOLDER / part}")
            with told(place / FOLDER / part):
                _write(place / FOLDER / part, task, part, outputs, model)


def predicted_parts(place: Path, task: TaskData, model: str) -> frozenset[str]:
    """Parts whose predictions by this model are in `place`. DistlmError for those of another model or other data."""
    found = set()
    for part in PARTS:
        folder = place / FOLDER / part
        if not (folder / PredictionFiles.NAME).exists() or not task.splits(part):
            continue
        before = PredictionFiles.read(folder / PredictionFiles.NAME)
        for name, old, new in (("model", before.model, model), ("data", before.data, task.part_fingerprint(part))):
            if old != new:
                raise DistlmError(
                    f"{folder}: predictions of another fine-tuning ({name} {old} there, {new} now); remove that "
                    "folder, or give this one a finetune.name= of its own, with finetune.checkpoint= the model"
                )
        found.add(part)
    return frozenset(found)


def say_missing(task: TaskData, config: FinetuneConfig, rank: int) -> None:
    """Which test sets there are no predictions of."""
    if task.missing:
        where = f"finetune.data_dir={config.data_dir}" if config.source == "folder" else "the data set"
        say(f"finetune: {where} has no {' or '.join(task.missing)} of {task.name}: no predictions for it", rank)


def _write(folder: Path, task: TaskData, part: str, outputs: Outputs, model: str) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rows = {}
    for split in task.splits(part):
        found = task.predict(split, outputs[split])
        _write_split(temporary, task, found)
        rows[split] = len(found.answers)
    files = sorted(temporary.iterdir())
    for path in files:
        sync_file(path)
    PredictionFiles(
        task=task.name, model=model, data=task.part_fingerprint(part), rows=rows, files=listing(files)
    ).write(temporary / PredictionFiles.NAME)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    sync_folder(folder.parent)


def _write_split(folder: Path, task: TaskData, found: Predictions) -> None:
    if task.head == "span":
        text = json.dumps(found.answers, indent=1, ensure_ascii=False) + "\n"
        (folder / "predictions.json").write_text(text, "utf-8")
    else:
        lines = ["index\tprediction", *(f"{name}\t{answer}" for name, answer in found.answers.items())]
        (folder / f"{found.name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    save_array(folder / f"{found.name}.logits.npy", found.numbers)
    save_array(folder / f"{found.name}.ids.npy", found.row_ids)
