"""`distlm export hf --finetuned NAME`: a fine-tuned model as a Hugging Face folder (distlm.models.plm.export).

AutoModelForSequenceClassification or AutoModelForQuestionAnswering, and AutoTokenizer read it, with memory, too;
finetune.checkpoint= and load_task_model do as well.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from distlm.errors import DistlmError, UsageError
from distlm.finetune.description import TaskModelConfig
from distlm.finetune.finished.state import SETTINGS
from distlm.finetune.model import TaskModel
from distlm.finetune.records import DECIDING, FinetuneSettings, SeedResult
from distlm.finetune.source import load_task_model
from distlm.finetune.stage import RESULT
from distlm.finetune.tasks.glue import TASKS
from distlm.models.export.card import Card, fenced
from distlm.models.export.run import export_model
from distlm.models.plm.config import PlmRun
from distlm.models.plm.export.write import save_pretrained
from distlm.models.plm.model import transformers_library
from distlm.models.plm.sizes import backbone_sizes
from distlm.runtime.rundir import RunDir

_SPECIALS = {"unk": ("[UNK]", "<unk>"), "mask": ("[MASK]", "<mask>")}
"""What a tokenizer calls these tokens; the others are told by their places."""


def export_finetuned(config: PlmRun, options: argparse.Namespace) -> dict[str, object]:
    """The model that the fine-tuning of finetune.name has kept for `--seed`, to the folder `--out`.

    Raises DistlmError when no model was kept, and for a folder that is not empty; UsageError for a seed to be chosen.
    """
    asked = config.finetune.each()
    if len(asked) > 1 and not config.finetune.name:
        raise UsageError(
            f"finetune.tasks={config.finetune.tasks}: a model of which of them? Name its folder in "
            f"{RunDir.of(config).finetune('')} with finetune.name="
        )
    name = config.finetune.name or asked[0].name
    folder = RunDir.of(config).finetune(name)
    kept = sorted(place for place in folder.glob("seed-*") if RunDir(place).complete_checkpoints())
    if not kept:
        raise DistlmError(
            f"{folder}: no fine-tuned model was kept there; fine-tune with finetune.keep_models=true (under a "
            "finetune.name= of its own), or name the fine-tuning with finetune.task= and finetune.name="
        )
    chosen = [place for place in kept if options.seed in (None, int(place.name.partition("-")[2]))]
    if len(chosen) != 1:
        raise UsageError(
            f"--seed {options.seed}: {folder} has {', '.join(place.name for place in kept)}; name one of them"
        )
    checkpoint = RunDir(chosen[0]).newest_checkpoint()

    def write(folder: Path) -> None:
        model, tokenizer = load_task_model(chosen[0], values=False)
        save_task_model(model, tokenizer, folder, _card(config, chosen[0], model.config), checkpoint)

    return export_model(options, chosen[0], write, finetuned=True)


def save_task_model(
    model: TaskModel, tokenizer: Any, folder: Path, card: Card | None = None, checkpoint: Path | None = None
) -> None:
    """Write the folder from a model and a tokenizer of the `tokenizers` library; the rest as save_pretrained.

    Raises DistlmError when the folder exists and is not empty, and when it cannot be written.
    """
    described, hf = model.config, model.hf.config
    names = TASKS[described.task].labels if described.task in TASKS else ()
    if described.head == "labels":
        labels = names or tuple(f"LABEL_{label}" for label in range(described.labels))
        hf.id2label, hf.label2id = dict(enumerate(labels)), {name: label for label, name in enumerate(labels)}
    kinds = {"labels": "single_label_classification", "number": "regression", "span": None}
    hf.problem_type, hf.finetuning_task = kinds[described.head], described.task
    with TemporaryDirectory() as temporary:
        _tokenizer(model, tokenizer).save_pretrained(temporary)
        save_pretrained(model, folder, Path(temporary), card, checkpoint)


def _card(config: PlmRun, seed: Path, described: TaskModelConfig) -> Card:
    """What the seed's records say."""
    result = SeedResult.read(seed / RESULT)
    settings = FinetuneSettings.read(seed.parent / SETTINGS)
    memory = f" with product-key memory at layers {described.memory['positions']}" if described.memory else ""
    what = f"A {described.backbone['model_type']}{memory}, fine-tuned on {described.task}."
    scores = "\n".join(f"{metric:<12}{value:.4f}" for metric, value in result.last.items())
    decided = {name: getattr(settings.config, name) for name in DECIDING}
    training = f"Fine-tuned for {result.updates:,} updates (seed {result.seed}) with distlm. Settings:\n\n"
    training += fenced(yaml.safe_dump({"finetune": decided}, sort_keys=False), "yaml")
    results = f"On dev, after the last epoch:\n\n{fenced(scores)}"
    return Card(f"{config.name}: {described.task}", what, results, training)


def _tokenizer(model: TaskModel, tokenizer: Any) -> Any:
    """That of transformers which gives what `tokenizer` gives."""
    pieces = tokenizer.encode("a").ids
    names = {"cls": pieces[0], "sep": pieces[-1], "pad": int(model.config.backbone["pad_token_id"])}
    tokens = {f"{name}_token": tokenizer.id_to_token(number) for name, number in names.items()}
    for name, spellings in _SPECIALS.items():
        there = next((piece for piece in spellings if tokenizer.token_to_id(piece) is not None), None)
        tokens |= {f"{name}_token": there} if there else {}
    inputs = ["input_ids", *(["token_type_ids"] if model.typed else []), "attention_mask"]
    return transformers_library().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs,
        model_max_length=backbone_sizes(model.config.backbone).positions, **tokens,
    )  # fmt: skip
