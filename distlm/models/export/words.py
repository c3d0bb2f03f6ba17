"""The dictionary of a word-level model as a tokenizer of the `tokenizers` library, for transformers' AutoTokenizer.

Text is split at white space, and each line's end is </s>, blank lines included: the ids of a whole file are those of
the token files. In front of a text stands one </s>, as before the first word of an evaluated text; with
add_special_tokens=False it does not. What a text spells out is text: "<unk>" is the word.
"""

import json
from pathlib import Path
from typing import Any

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError
from distlm.installed import install

_ROLES = {"bos": Dictionary.EOS, "eos": Dictionary.EOS, "pad": Dictionary.PAD, "unk": Dictionary.UNK}
"""What transformers calls a special word → its id."""


def save_words(dictionary: Dictionary, folder: Path, longest: int) -> None:
    """tokenizer.json and tokenizer_config.json; `longest`: tokens that the model takes.

    Raises DistlmError without the library.
    """
    word_tokenizer(dictionary).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **{f"{role}_token": Dictionary.SPECIALS[number] for role, number in _ROLES.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def word_tokenizer(dictionary: Dictionary) -> Any:
    """Of the `tokenizers` library."""
    try:
        import tokenizers
    except ImportError as error:
        raise DistlmError(f"export needs tokenizers: {install('hf')} ({error})") from error
    end, unk = Dictionary.SPECIALS[Dictionary.EOS], Dictionary.SPECIALS[Dictionary.UNK]
    ids = {word: number for number, word in enumerate(dictionary.words)}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk))
    found.normalizer = tokenizers.normalizers.Replace("\n", f" {end} ")
    # What Python's str.split takes for white space.
    space = tokenizers.Regex(r"[\s\x1c-\x1f\x85]+")
    found.pre_tokenizer = tokenizers.pre_tokenizers.Split(space, behavior="removed")
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, Dictionary.EOS)]
    )
    return found
