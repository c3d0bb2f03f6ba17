"""A causal language model of Hugging Face as a folder: as transformers saves it, with its tokenizer and a card."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.data.subwords import FIRST_PIECE, TOKENIZER, Subwords
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.export.card import run_card
from distlm.models.export.folder import write_export
from distlm.models.export.memory import memory_words, reader_settings, write_model
from distlm.models.export.run import export_model
from distlm.models.export.subclass import subclass
from distlm.models.hf.config import HfRun
from distlm.models.hf.description import HfModel
from distlm.models.hf.model import HfLM
from distlm.models.io import check_dictionary, load_model
from distlm.runtime.rundir import RunDir

_AUTO, _GENERATION = "AutoModelForCausalLM", "generation_config.json"
_SAMPLE = 2000
"""Tokens by which two tokenizers are compared."""


def export_run(config: HfRun, options: argparse.Namespace) -> dict[str, object]:
    """`distlm export hf`: the best checkpoint of a run, with the tokenizer of its token files.

    Raises DistlmError when there is none, when the token files are of another dictionary, and as export_model.
    """
    run = RunDir.of(config)
    checkpoint = run.model_checkpoint(config)
    tokens = TokenFiles.open(run.tokens(config))

    def write(folder: Path) -> None:
        model, card = load_model(checkpoint, values=False)
        check_dictionary(card, tokens.dictionary)
        assert isinstance(model, HfLM)
        hf = model.hf
        memory = reader_settings(model.config.memory, model.width) if model.memories else {}
        what = f"A {hf.config.model_type} language model over sub-words ({type(hf).__name__}){memory_words(memory)}."
        tokenizer, use = _tokenizer(tokens, config.data.tokenizer, model.config)

        def fill(temporary: Path) -> None:
            import transformers

            transformers.utils.logging.disable_progress_bar()
            if memory:
                code = subclass("distlm.models.hf.modeling:ReadsMemory", type(hf), type(hf.config), _AUTO)
                code.write(temporary, {**hf.config.to_dict(), "memory": memory})
                write_model(temporary, hf, model.memories, checkpoint, memory)
            else:
                # With the model, transformers may refuse to save settings that it has read.
                generation = hf.generation_config
                hf.generation_config = transformers.GenerationConfig.from_model_config(hf.config)
                hf.save_pretrained(temporary)
                hf.generation_config = generation
            if model.config.generation:
                hf.generation_config.to_json_file(temporary / _GENERATION)
            tokenizer.save_pretrained(temporary)
            run_card(config, checkpoint, what, use).write(temporary, folder.name, _AUTO, bool(memory))

        write_export(folder, card.kind, fill)

    return export_model(options, checkpoint, write)


def _tokenizer(tokens: TokenFiles, name: str, model: HfModel) -> tuple[Any, str]:
    """That of transformers, which puts in front of a text what the model has in front of each block, where it has a
    token there, and what to know of it, for the card.

    It is the one that data.tokenizer names where that cuts as the token files' own, for it knows the special tokens;
    else it is made from theirs.
    """
    import transformers
    from tokenizers import Tokenizer

    own = tokens.folder / TOKENIZER
    if tokens.tokenizer is None or not own.is_file():
        raise DistlmError(f"{own}: missing; put the tokenizer of {tokens.folder} back, or prepare the text again")
    kept = Tokenizer.from_file(str(own))
    found: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=kept, model_max_length=model.max_positions)
    try:
        named = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if _same(named.backend_tokenizer, kept, tokens.split("train")[:_SAMPLE]):
            found = named
    except (OSError, ValueError, KeyError, AttributeError):
        # It is elsewhere, or gone.
        pass
    use = f"In training each line ended with the piece `{tokens.tokenizer.line_end_piece}`."
    return found, f"{use} {_front(found.backend_tokenizer, tokens.tokenizer.line_end, model)}".strip()


def _same(named: Any, kept: Any, ids: npt.NDArray[np.int32]) -> bool:
    """Both have the same pieces, and cut the text of `ids` alike."""
    if named.get_vocab() != kept.get_vocab():
        return False
    text = kept.decode([int(i) - FIRST_PIECE for i in ids if i >= FIRST_PIECE])
    cut = [tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in (named, kept)]
    return bool(cut[0] == cut[1])


def _front(backend: Any, line_end: int, model: HfModel) -> str:
    """Let a tokenizer put the model's beginning-of-text token in front of a text where it does not; for the card."""
    from tokenizers.processors import TemplateProcessing

    puts = Subwords(backend, line_end).begin
    if not model.begins:
        if puts is None:
            return ""
        return (
            f"No beginning-of-text token stood in front of a text; the tokenizer puts `{backend.id_to_token(puts)}` "
            "there, which `add_special_tokens=False` leaves out."
        )
    piece = backend.id_to_token(model.begin)
    if puts != model.begin:
        backend.post_processor = TemplateProcessing(single=[piece, "$A"], special_tokens=[(piece, model.begin)])
    return f"A text begins with the piece `{piece}`, which the tokenizer puts in front."
