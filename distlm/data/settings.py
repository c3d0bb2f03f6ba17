"""Which settings decide the token files, and whether a folder holds the token files of some settings."""

import os
from pathlib import Path

import msgspec

from distlm.config.schema import DataConfig
from distlm.data.dictionary import Dictionary
from distlm.data.records import TextSource, TokenSettings
from distlm.data.subwords import Subwords
from distlm.data.text.folder import sizes_now
from distlm.data.tokens import META, TokenFiles
from distlm.errors import DistlmError


def token_settings(data: DataConfig) -> TokenSettings:
    """The settings that decide the token files, for this source."""
    settings = TokenSettings(data.source)
    if data.source == "folder":
        settings.text_dir = os.path.realpath(data.text_dir)
        if data.text_field != DataConfig.text_field:
            settings.text_field = data.text_field
    elif data.source == "hub":
        settings.hub_name, settings.hub_config, settings.hub_field = data.hub_name, data.hub_config, data.hub_field
    if data.valid_share:
        settings.valid_share = data.valid_share
    if data.test_share:
        settings.test_share = data.test_share
    if data.valid_share or data.test_share:
        settings.documents = data.documents
    if data.first_words:
        settings.first_words = data.first_words
    if data.tokenizer:
        settings.tokenizer = Subwords.load(data.tokenizer, data.line_end).hash
    elif given := given_dictionary(data):
        settings.dictionary = given.hash
    else:
        settings.min_count, settings.max_words = data.min_count, data.max_words
        settings.pad_to_multiple = data.pad_to_multiple
    return settings


def given_dictionary(data: DataConfig) -> Dictionary | None:
    """The dictionary of data.dictionary, if that is set."""
    if not data.dictionary:
        return None
    if not Path(data.dictionary).is_file():
        raise DistlmError(f"data.dictionary={data.dictionary}: no such file")
    try:
        return Dictionary.load(Path(data.dictionary))
    except DistlmError as error:
        raise DistlmError(
            f"data.dictionary={data.dictionary}: not a dictionary, of lines 'word count' in UTF-8 ({error}); name a "
            "dict.txt of token files or of fairseq"
        ) from error


def finished_tokens(folder: Path, data: DataConfig) -> TokenFiles | None:
    """The token files of these settings, or None when the folder is not (completely) prepared.

    Raises DistlmError when it was prepared with other settings, or text files have changed in size since, or are new.
    """
    if not (folder / META).exists():
        return None
    tokens = TokenFiles.open(folder)
    settings = token_settings(data)
    before, now = msgspec.to_builtins(tokens.meta.settings), msgspec.to_builtins(settings)
    changed = [
        f"data.{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise DistlmError(
            f"{folder}: token files were prepared with other settings ({'; '.join(changed)}); "
            "use the same settings, or another data.tokens_dir or run_dir"
        )
    if settings.text_dir:
        _refuse_other_text(folder, tokens.meta.source, Path(settings.text_dir))
    return tokens


def _refuse_other_text(folder: Path, source: TextSource, text_dir: Path) -> None:
    """DistlmError naming a text file that has another size than it had, or was not there. One that is gone is none."""
    splits = [*([file] for file in (source.files or {}).values()), *(source.folders or {}).values()]
    for files in splits:
        before = {file.name: file.bytes for file in files}
        for name, size in sorted(sizes_now(text_dir, before).items()):
            if name not in before:
                raise DistlmError(
                    f"{text_dir / name}: was not there when {folder} was prepared; move it away, or choose another "
                    "data.tokens_dir or run_dir"
                )
            if size != before[name]:
                raise DistlmError(
                    f"{text_dir / name}: has {size} bytes, and had {before[name]} when {folder} was prepared; "
                    "put the old text back, or choose another data.tokens_dir or run_dir"
                )
