"""A language model over words as a Hugging Face folder: its code, weights and dictionary."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from distlm.config.schema import RunConfig
from distlm.data.dictionary import Dictionary
from distlm.data.tokens import TokenFiles
from distlm.memory.of_model import Memories
from distlm.models.export.card import run_card
from distlm.models.export.folder import Code, write_export
from distlm.models.export.memory import memory_words, reader_settings, write_model
from distlm.models.export.run import export_model
from distlm.models.export.source import Collector, Place
from distlm.models.export.words import save_words
from distlm.models.io import check_dictionary, load_model
from distlm.runtime.rundir import RunDir

AUTO = "AutoModelForCausalLM"
_REPLACED = {
    "distlm.data.dictionary:Dictionary": "distlm.data.dictionary:Specials",
    "distlm.errors:DistlmError": "ValueError",
    "distlm.errors:UsageError": "ValueError",
    "distlm.models.language_model:LanguageModel": "nn.Module",
}
_USE = (
    "Ids are those of the words in training: a text is split at white space, each line's end is `</s>`, and one `</s>` "
    "stands in front, where the model expects it. Logits are log-probabilities. `generate` works without a cache "
    "(each word costs a pass over the text) and does not stop at `</s>`, which ends a line: give `max_new_tokens`."
)


@dataclass(frozen=True)
class WordModel:
    """What is to be copied of a kind of model."""

    model: str
    """MODULE:CLASS of the CausalWords."""
    config: str
    """MODULE:CLASS of its configuration."""
    replaced: Mapping[str, str]
    """As Collector's: of what model.json records, and of what is training's alone."""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """As Collector's."""

    @property
    def code(self) -> Code:
        """The code of such models."""
        collector = Collector({**_REPLACED, **self.replaced}, self.left_out).add([self.model])
        name, config = Place.of(self.model).name, Place.of(self.config).name
        header = f"{name}; needs torch and transformers."
        return Code(collector.source(header), self._model_type, config, {AUTO: name})

    @property
    def _model_type(self) -> str:
        from importlib import import_module

        place = Place.of(self.config)
        found: str = getattr(import_module(place.module), place.name).model_type
        return found


def export_words(config: RunConfig, options: argparse.Namespace, what: WordModel, said: str) -> dict[str, object]:
    """The best checkpoint of a run; `said`: the model in words.

    Raises DistlmError when there is none, when the token files are of another dictionary, and as export_model.
    """
    run = RunDir.of(config)
    checkpoint = run.model_checkpoint(config)
    tokens = TokenFiles.open(run.tokens(config))

    def write(folder: Path) -> None:
        model, card = load_model(checkpoint, values=False)
        check_dictionary(card, tokens.dictionary)
        settings = asdict(model.config) | {  # type: ignore[call-overload]
            "vocab_size": card.vocabulary, "bos_token_id": Dictionary.EOS, "pad_token_id": Dictionary.PAD,
            "eos_token_id": None, "use_cache": False,
        }  # fmt: skip
        for name in ("kind", "seed"):
            settings.pop(name, None)
        memories: Memories = getattr(model, "memories", {})
        if memories:
            settings["memory"] = reader_settings(settings["memory"], model.width)

        def fill(temporary: Path) -> None:
            what.code.write(temporary, settings)
            write_model(temporary, model, memories, checkpoint, settings.get("memory") or {}, "model.")
            save_words(tokens.dictionary, temporary, settings["max_positions"])
            words = memory_words(settings.get("memory") or {})
            run_card(config, checkpoint, said.replace("{memory}", words), _USE).write(
                temporary, folder.name, AUTO, True
            )

        write_export(folder, card.kind, fill)

    return export_model(options, checkpoint, write)
