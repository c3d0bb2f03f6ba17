"""What a fine-tuning starts from: a model that distlm pretrained or exported, or one of Hugging Face, with its
tokenizer."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from torch import Tensor

from distlm.config.yaml_files import recorded_settings
from distlm.data.shards.files import TOKENIZER_FOLDER
from distlm.data.shards.wordpiece import TOKENIZER, VOCABULARY, WordPiece
from distlm.errors import DistlmError
from distlm.finetune.description import TaskModelConfig
from distlm.finetune.labels import require_label_order
from distlm.finetune.model import TaskModel
from distlm.finetune.tasks.glue import TASKS
from distlm.memory.of_model import restore_memories
from distlm.models.card import CARD, model_of_card, read_model_card
from distlm.models.complete import MEMORY, check_files, memory_files
from distlm.models.io import read_weights
from distlm.models.plm.config import FinetuneConfig
from distlm.models.plm.description import Backbone, PlmModel
from distlm.models.plm.export.read import (
    TASK_HEADS,
    has_memory,
    read_folder,
    task_head,
    tokenizer_options,
    value_hashes,
    without_values,
)
from distlm.models.plm.model import transformers_library
from distlm.models.plm.sizes import backbone_sizes
from distlm.models.records import ModelCard
from distlm.runtime.files import bytes_hash, json_hash
from distlm.runtime.rundir import RunDir
from distlm.system_errors import refuse

_PADDED_VOCABULARY = 128
"""A model may have up to so many rows more than its tokenizer has pieces."""

_TASK_NAMES = {task.hub_config: task.name for task in TASKS.values()} | {"squad": "SQuAD"}
"""What transformers' examples call a task → finetune.task."""

_TOKENIZER_FILES = (TOKENIZER, VOCABULARY, "vocab.json")


@dataclass(frozen=True)
class Source:
    """Weights, configuration and tokenizer."""

    name: str
    """As errors call it."""
    folder: Path | None
    """Where the memory's files are; None: a model without memory that distlm did not write."""
    backbone: Backbone
    memory: dict[str, Any]
    seed: int
    """Of the memory's values, keys and queries."""
    vocabulary: int
    weights: Mapping[str, Tensor]
    """Name in a TaskModel → value, as far as the source has it."""
    tokenizer: Any
    """Of the `tokenizers` library."""
    tokenizer_hash: str
    pad: int
    fingerprint: str
    """Of weights, memory and tokenizer."""
    task: TaskModelConfig | None = None
    """Of a fine-tuned model: what it is, with its head."""

    @property
    def max_positions(self) -> int:
        """Longest row that the model takes, in tokens."""
        return backbone_sizes(self.backbone).positions


def open_source(config: FinetuneConfig, run: Path, shards: Path) -> Source:
    """The source that finetune.checkpoint names, or the newest checkpoint of the run directory `run`.

    `shards`: where this run's shards lie. Raises DistlmError for what is not there or damaged, of another kind, and
    for a tokenizer that is not the model's.
    """
    if not config.checkpoint:
        if not RunDir(run).complete_checkpoints():
            raise DistlmError(
                f"finetune.checkpoint is empty, and {run} has no checkpoint; name a run directory, a checkpoint or a "
                "Hugging Face folder"
            )
        return _ours(run, config, shards)
    path = Path(config.checkpoint)
    if _is_ours(path):
        return _ours(path, config, shards)
    return _exported(path, config) if has_memory(path) else _hugging_face(config)


def open_finetuned(config: FinetuneConfig, rank: int = 0) -> Source:
    """The fine-tuned model that finetune.checkpoint names, with its head; Source.task describes it.

    A seed's folder (RUN/finetune/NAME/seed-N) or a checkpoint in it, or a Hugging Face folder with the head of a task;
    `rank` 0 says where the names of its labels do not tell their order. Raises DistlmError for what is not there or
    damaged, for a model that was not fine-tuned, and for labels in another order than those of finetune.task.
    """
    path = Path(config.checkpoint)
    if _is_ours(path):
        if read_model_card(_newest(path)).kind == TaskModelConfig.KIND:
            return _ours(path, config, path)
    elif (path / "config.json").is_file() and task_head(path):
        source = _exported_task(path, config)
        require_label_order(source.name, source.backbone.get("id2label") or {}, config.task, rank)
        return source
    raise DistlmError(
        f"finetune.checkpoint={path}: not a fine-tuned model; name the folder of a seed that was kept "
        "(finetune.keep_models=true: RUN/finetune/NAME/seed-N), or an exported one"
    )


def _is_ours(path: Path) -> bool:
    """Whether a path is a run directory or checkpoint of distlm."""
    return (path / "complete.json").exists() or (path / CARD).exists() or (path / "checkpoints").is_dir()


def _newest(path: Path) -> Path:
    """The newest checkpoint of a run directory, or the checkpoint itself. DistlmError for a run without one."""
    if not (path / "checkpoints").is_dir():
        return path
    found = RunDir(path).complete_checkpoints()
    if not found:
        raise DistlmError(f"finetune.checkpoint={path}: a run directory without a complete checkpoint")
    return found[-1]


def start_from_source(model: TaskModel, source: Source, whole: bool = False) -> None:
    """Copy the source's weights into a fresh model; a head that the source lacks or has for another task, and a pooler
    that it lacks, stay fresh. `whole`: all of them must be there.

    Raises DistlmError when the source lacks a weight of the encoder, or has it in another shape.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = source.weights.get(name)
            head = not name.startswith(model.prefix)
            fits = found is not None and (not head or found.shape == parameter.shape)
            if not whole and not fits and (head or ".pooler." in name):
                continue
            if found is None or found.shape != parameter.shape:
                there = "missing" if found is None else str(list(found.shape))
                raise DistlmError(
                    f"{source.name}: {name} is {there} there, {list(parameter.shape)} by its configuration; the "
                    "checkpoint is not whole, get it again"
                )
            parameter.copy_(found)


def _ours(path: Path, config: FinetuneConfig, shards: Path) -> Source:
    folder = _newest(path)
    name = f"finetune.checkpoint={folder}"
    weights, card = read_weights(folder)
    described = model_of_card(card)
    if not isinstance(described, PlmModel | TaskModelConfig):
        raise DistlmError(f"{name}: a {card.kind}, not a masked language model")
    for layer in described.memory.get("positions", []):
        _require_memory(name, folder, layer)
    tokenizer = _tokenizer_of(config, folder, shards, card)
    tokenizer_hash = hash_of_tokenizer(tokenizer)
    return Source(
        name, folder, described.backbone, described.memory, described.seed, card.vocabulary, weights,
        tokenizer, tokenizer_hash, int(described.backbone["pad_token_id"]),
        checkpoint_fingerprint(folder, tokenizer_hash), described if isinstance(described, TaskModelConfig) else None,
    )  # fmt: skip


def checkpoint_fingerprint(folder: Path, tokenizer_hash: str) -> str:
    """Of weights, memory and tokenizer of a checkpoint. Raises DistlmError when a file of it is missing."""
    return json_hash([read_model_card(folder).weights, memory_files(folder), tokenizer_hash])


def _require_memory(name: str, folder: Path, layer: int) -> None:
    """Compare the files of a layer's memory with the checkpoint's marker."""
    if not check_files(folder, "copy the whole checkpoint folder", f"{MEMORY}{layer:02d}-"):
        raise DistlmError(
            f"{name}: a checkpoint without its memory: no files of layer {layer}'s values (a fine-tuning with frozen "
            "values keeps them with finetune.keep_models=true); use another checkpoint"
        )


def hash_of_tokenizer(tokenizer: Any) -> str:
    """Identifies a tokenizer of the `tokenizers` library."""
    return bytes_hash(tokenizer.to_str().encode())


def read_tokenizer(path: Path, wanted: str) -> Any:
    """The tokenizer of a fine-tuned model's folder. Raises DistlmError unless it is there and has that hash."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    # The library raises plain Exception.
    except Exception as error:
        refuse(error, path)
        raise DistlmError(f"{path}: no tokenizer that can be read ({error}); copy the whole checkpoint") from error
    if hash_of_tokenizer(tokenizer) != wanted:
        raise DistlmError(f"{path}: vocabulary mismatch: not the tokenizer of this model; copy the whole checkpoint")
    return tokenizer


def _tokenizer_of(config: FinetuneConfig, folder: Path, shards: Path, card: ModelCard) -> Any:
    if card.kind == PlmModel.KIND:
        wordpiece = _wordpiece(config, folder, shards, card.dictionary, card.vocabulary)
        tokenizer = wordpiece.bare_tokenizer()
        tokenizer.post_processor = wordpiece.tokenizer().post_processor
        return tokenizer
    return read_tokenizer(folder / TOKENIZER, card.dictionary)


def _wordpiece(config: FinetuneConfig, folder: Path, shards: Path, wanted: str, size: int) -> WordPiece:
    """The tokenizer that a checkpoint was trained with, by its hash."""
    run = folder.parent.parent
    places = [Path(config.tokenizer)] if config.tokenizer else [folder, _shards_of(run) / TOKENIZER_FOLDER]
    if not config.tokenizer:
        places.append(shards / TOKENIZER_FOLDER)
    there = [place for place in places if place.is_file() or (place / VOCABULARY).is_file()]
    if not there:
        raise DistlmError(
            f"finetune.checkpoint={folder}: no tokenizer at {' or '.join(map(str, places))}; set finetune.tokenizer to "
            "the vocab.txt that the model was trained with (shards: tokenizer/vocab.txt)"
        )
    for place in there:
        for lower_case in (True, False):
            found = WordPiece.load(place, lower_case)
            if found.hash == wanted:
                return found
    raise DistlmError(
        f"{there[0]}: vocabulary mismatch: not the vocabulary that finetune.checkpoint={folder} was trained with "
        f"({len(found.pieces)} pieces, the model has {size}, hash {wanted}); set finetune.tokenizer to that one"
    )


def _shards_of(run: Path) -> Path:
    """Where the shards lie that a run directory was trained on."""
    path = run / "configs" / "train.yaml"
    return Path(recorded_settings(path).get("shards", {}).get("folder") or run / "shards")


def _hugging_face(config: FinetuneConfig) -> Source:
    name = f"finetune.checkpoint={config.checkpoint}"
    library = transformers_library()
    with _quiet(library):
        try:
            model, facts = library.AutoModel.from_pretrained(config.checkpoint, output_loading_info=True)
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise DistlmError(
                f"{name}: neither a run directory or checkpoint of distlm, nor a folder or name on the hub that "
                f"transformers can read ({error})"
            ) from error
    found: Backbone = model.config.to_dict()
    if found["model_type"] not in ("bert", "distilbert", "roberta"):
        raise DistlmError(f"{name}: a {found['model_type']}; bert, distilbert and roberta are known")
    size = found.pop("vocab_size")
    tokenizer, pad = _transformers_tokenizer(config, name, size)
    missing = set(facts["missing_keys"])
    weights = {
        f"hf.{model.base_model_prefix}.{key}": value.detach().float()
        for key, value in model.named_parameters()
        if key not in missing
    }
    tokenizer_hash = hash_of_tokenizer(tokenizer)
    return Source(
        name, None, found, {}, 1, size, weights, tokenizer, tokenizer_hash, pad,
        json_hash([_hash_of_weights(weights), tokenizer_hash]),
    )  # fmt: skip


def _exported(folder: Path, config: FinetuneConfig) -> Source:
    """An exported folder that has a memory."""
    name = f"finetune.checkpoint={folder}"
    if task_head(folder):
        source = _exported_task(folder, config)
        # As from a folder without memory: the head is a fresh one.
        encoder = f"hf.{source.backbone['model_type']}."
        return replace(source, weights={n: w for n, w in source.weights.items() if n.startswith(encoder)})
    model = without_values(folder)
    weights = {key: value.detach() for key, value in model.named_parameters()}
    tokenizer, pad = _transformers_tokenizer(config, name, model.vocabulary)
    tokenizer_hash = hash_of_tokenizer(tokenizer)
    return Source(
        name, folder, model.config.backbone, model.config.memory, model.config.seed, model.vocabulary, weights,
        tokenizer, tokenizer_hash, pad, json_hash([_hash_of_weights(weights), value_hashes(folder), tokenizer_hash]),
    )  # fmt: skip


def _exported_task(folder: Path, config: FinetuneConfig) -> Source:
    """A Hugging Face folder with the head of a task, with or without memory."""
    name, found = f"finetune.checkpoint={folder}", read_folder(folder)
    backbone = found.backbone
    if backbone["model_type"] not in ("bert", "distilbert", "roberta"):
        raise DistlmError(f"{name}: a {backbone['model_type']}; bert, distilbert and roberta are known")
    named = str(backbone.get("finetuning_task") or "")
    size, labels = backbone.pop("vocab_size"), len(backbone.get("id2label") or (0, 1))
    span = task_head(folder) == TASK_HEADS[1]
    number = backbone.get("problem_type") == "regression" or (labels == 1 and not span)
    task = TaskModelConfig(
        backbone, found.memory, 1, "span" if span else "number" if number else "labels", 2 if span else labels,
        _TASK_NAMES.get(named, named),
    )  # fmt: skip
    weights = {f"hf.{key}": value.float() for key, value in found.weights.items()}
    tokenizer, pad = _transformers_tokenizer(config, name, size)
    tokenizer_hash = hash_of_tokenizer(tokenizer)
    values = value_hashes(folder) if found.memory else {}
    return Source(
        name, folder if found.memory else None, backbone, found.memory, 1, size, weights, tokenizer, tokenizer_hash,
        pad, json_hash([_hash_of_weights(weights), values, tokenizer_hash]), task,
    )  # fmt: skip


def _hash_of_weights(weights: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for key, value in weights.items():
        digest.update(key.encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _transformers_tokenizer(config: FinetuneConfig, name: str, size: int) -> tuple[Any, int]:
    """The tokenizer of a Hugging Face folder, for a model of `size` embeddings; and the id of its padding."""
    library = transformers_library()
    place = config.tokenizer or config.checkpoint
    place = str(Path(place).parent) if Path(place).is_file() else place
    with _quiet(library):
        try:
            if Path(place).is_dir() and not any((Path(place) / file).is_file() for file in _TOKENIZER_FILES):
                # transformers would make up an empty one.
                raise OSError(f"none of {', '.join(_TOKENIZER_FILES)} in it")
            tokenizer = library.AutoTokenizer.from_pretrained(place, **tokenizer_options(place))
            backend = tokenizer.backend_tokenizer
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DistlmError(
                f"{name}: no tokenizer that transformers can read at {place} ({error}); set finetune.tokenizer to the "
                "folder of the tokenizer that the model was trained with"
            ) from error
    if not size - _PADDED_VOCABULARY < len(tokenizer) <= size:
        raise DistlmError(
            f"{place}: vocabulary mismatch: a tokenizer of {len(tokenizer)} pieces, {name} has {size}; set "
            "finetune.tokenizer to the folder of the tokenizer that the model was trained with"
        )
    backend.no_truncation()
    backend.no_padding()
    return backend, int(tokenizer.pad_token_id)


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """No bars, and no warnings that a head is new: it is meant to be."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_task_model(folder: Path, values: bool = True) -> tuple[TaskModel, Any]:
    """A fine-tuned model in eval mode, and its tokenizer: see open_finetuned for what `folder` may be.

    `values`: false leaves the memories' values and statistics in their files. Raises DistlmError for another
    kind of model and for missing or damaged files.
    """
    source = open_finetuned(FinetuneConfig(checkpoint=str(folder)))
    assert source.task is not None
    model = TaskModel(source.task, source.vocabulary)
    start_from_source(model, source, whole=True)
    if model.memories and values:
        assert source.folder is not None
        restore_memories(model.memories, source.folder, moments=False)
    return model.eval(), source.tokenizer
