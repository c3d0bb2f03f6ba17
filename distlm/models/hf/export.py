"""A causal language model of Hugging Face as a folder: as transformers saves it, with its tokenizer and a card."""

import argparse
from pathlib import Path
from typing import Any

from distlm.data.subwords import TOKENIZER
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.models.export.card import run_card
from distlm.models.export.folder import write_export
from distlm.models.export.memory import memory_words, reader_settings, write_model
from distlm.models.export.run import export_model
from distlm.models.export.subclass import subclass
from distlm.models.hf.config import HfRun
from distlm.models.hf.model import HfLM
from distlm.models.io import check_dictionary, load_model
from distlm.runtime.rundir import RunDir

_AUTO = "AutoModelForCausalLM"


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
        use = (
            f"In training each line ended with the piece `{tokens.tokenizer.line_end_piece}`."
            if tokens.tokenizer
            else ""
        )

        def fill(temporary: Path) -> None:
            import transformers

            transformers.utils.logging.disable_progress_bar()
            if memory:
                code = subclass("distlm.models.hf.modeling:ReadsMemory", type(hf), type(hf.config), _AUTO)
                code.write(temporary, {**hf.config.to_dict(), "memory": memory})
                write_model(temporary, hf, model.memories, checkpoint, memory)
            else:
                hf.save_pretrained(temporary)
            _tokenizer(tokens, config.data.tokenizer, model.config.max_positions).save_pretrained(temporary)
            run_card(config, checkpoint, what, use).write(temporary, folder.name, _AUTO, bool(memory))

        write_export(folder, card.kind, fill)

    return export_model(options, checkpoint, write)


def _tokenizer(tokens: TokenFiles, name: str, longest: int) -> Any:
    """That of transformers: the one that data.tokenizer names where it gives the same ids, for it knows the special
    tokens; else made from the token files' own."""
    import transformers
    from tokenizers import Tokenizer

    own = tokens.folder / TOKENIZER
    if not own.is_file():
        raise DistlmError(f"{own}: missing; put the tokenizer of {tokens.folder} back, or prepare the text again")
    kept = Tokenizer.from_file(str(own))
    try:
        named = transformers.AutoTokenizer.from_pretrained(name)
        if named.backend_tokenizer.get_vocab() == kept.get_vocab():
            return named
    except (OSError, ValueError, KeyError, AttributeError):
        # It is elsewhere, or gone.
        pass
    return transformers.PreTrainedTokenizerFast(tokenizer_object=kept, model_max_length=longest)
