"""The stage `distlm data prepare`: count the words of train, build the dictionary, encode each split, then meta.json.

Rank 0 works, the others wait: WikiText-103 takes about a minute. The text is streamed twice and not altered.
Files: {train,valid,test}.bin, dict.txt and, last, meta.json; a killed run leaves no meta.json and starts over.
"""

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import UNSET

from distlm.config.schema import DataConfig
from distlm.data.corpus import Corpus, open_corpus
from distlm.data.dictionary import Dictionary
from distlm.data.editions import recognise
from distlm.data.estimate import plan_prepare
from distlm.data.records import SplitFacts, TokensMeta
from distlm.data.settings import finished_tokens, given_dictionary, token_settings
from distlm.data.subwords import TOKENIZER, Encoded, Subwords
from distlm.data.text.check import spelled_note
from distlm.data.tokens import DICTIONARY, DTYPE, META, SPLITS, TokenFiles, split_path
from distlm.errors import DistlmError, Stopped
from distlm.runtime.files import atomic_path, file_hash, require_free_disk, sweep_temporaries
from distlm.runtime.lock import in_turn
from distlm.runtime.metrics import STAGE_SECONDS, TOKENS_PER_S
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.stage import Stage

__all__ = ["finished_tokens", "plan_prepare", "run_prepare"]

CHUNK = 1 << 20
"""Ids encoded before they are written (and words counted at once)."""
_LOCK = ".prepare.lock"


class PrepareSummary(TypedDict):
    """What the stage prints."""

    folder: str
    already: bool
    """There was nothing to do."""
    tokens: dict[str, int]
    """Of each split."""
    vocabulary: int
    edition: str | None
    """Of an exact copy of a published corpus."""


def run_prepare(stage: Stage) -> PrepareSummary:
    """Text → token files.

    Raises DistlmError on every rank for bad text or settings, when the folder was prepared with other settings, or
    when it holds files that are not token files. A folder already complete with the same settings is left as it is.
    """
    return rank0_first(stage.comm, lambda: _prepare(stage))


def count_words(lines: Iterable[str], advance: Callable[[int], None]) -> Counter[str]:
    """Occurrences of each word (split on whitespace). `advance` is told of each chunk's lines."""
    counts: Counter[str] = Counter()
    words: list[str] = []
    waiting = 0
    for line in lines:
        words += line.split()
        waiting += 1
        if len(words) >= CHUNK or waiting >= CHUNK:
            counts.update(words)
            advance(waiting)
            words, waiting = [], 0
    counts.update(words)
    advance(waiting)
    return counts


def encode_lines(lines: Iterable[str], dictionary: Dictionary) -> Iterator[tuple[npt.NDArray[np.int32], int]]:
    """Chunks of ids, each line's words and then EOS: (int32 [about CHUNK], lines in the chunk)."""
    ids, count, id_of = array("i"), 0, dictionary.ids.__getitem__
    for line in lines:
        ids.extend(map(id_of, line.split()))
        ids.append(Dictionary.EOS)
        count += 1
        if len(ids) >= CHUNK:
            yield np.frombuffer(ids, np.intc).astype(DTYPE), count
            ids, count = array("i"), 0
    if count:
        yield np.frombuffer(ids, np.intc).astype(DTYPE), count


def _prepare(stage: Stage) -> PrepareSummary:
    data, folder = stage.config.data, stage.run.tokens(stage.config)
    if folder.exists() and not folder.is_dir():
        raise DistlmError(f"{folder}: token files need a folder, and this is a file; choose another data.tokens_dir")
    # First without the lock: a finished folder may be read-only.
    finished = finished_tokens(folder, data)
    if finished is not None:
        stage.require_whole(folder, finished.written(), alone=True)
        return _nothing_to_do(finished)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder, stage):
        finished = finished_tokens(folder, data)
        if finished is not None:
            return _nothing_to_do(finished)
        _refuse_foreign(folder)
        sweep_temporaries(folder)
        start = time.monotonic()
        _write(stage, folder)
        seconds = time.monotonic() - start
        summary = _summary(TokenFiles.open(folder), already=False)
    rate = sum(summary["tokens"].values()) / seconds
    stage.run.metrics.write("prepare", {STAGE_SECONDS: round(seconds, 3), TOKENS_PER_S: round(rate)})
    counts = ", ".join(f"{split} {count:,}" for split, count in summary["tokens"].items())
    say(f"data prepare: {folder}: {counts} tokens, vocabulary {summary['vocabulary']:,}, {rate:,.0f} tokens/s")
    return summary


def _nothing_to_do(tokens: TokenFiles) -> PrepareSummary:
    say(f"data prepare: {tokens.folder} is complete with the same settings; nothing to do")
    return _summary(tokens, already=True)


def _write(stage: Stage, folder: Path) -> None:
    data = stage.config.data
    subwords = Subwords.load(data.tokenizer, data.line_end) if data.tokenizer else None

    def obey(size: int = 0) -> None:
        if stage.stop.reason is not None:
            raise Stopped(f"{folder}: stopped while preparing tokens; the same command starts the stage over")

    corpus = open_corpus(data, subwords.specials if subwords else (), obey)
    if corpus.spelled:
        say(f"data prepare: {spelled_note(corpus.spelled)}")
    total = sum(corpus.lines.values()) + (corpus.lines["train"] if subwords is None else 0)
    with Progress("data prepare", total, "lines") as progress:

        def advance(lines: int, doing: str) -> None:
            progress.advance(lines, doing=doing)
            obey()

        if subwords is None:
            counts = count_words(corpus.read("train"), lambda lines: advance(lines, "count"))
            dictionary, tokens = _word_dictionary(corpus, data, counts), counts.total() + corpus.lines["train"]
            types = len(counts.keys() | {"<unk>", "</s>"})
            encode = _word_encoder(dictionary)
            del counts
        else:
            tokens = round(subwords.tokens_per_line(corpus.read("train")) * corpus.lines["train"])
            encode = subwords.encode
        tokens = tokens * sum(corpus.lines.values()) // corpus.lines["train"]
        for split in SPLITS:
            # Those of a killed start need no room beside the new ones.
            split_path(folder, split).unlink(missing_ok=True)
        require_free_disk(folder, tokens * DTYPE.itemsize, "token files")
        splits = {
            split: _write_split(folder, corpus, split, encode, lambda lines, s=split: advance(lines, s))  # type: ignore[misc]
            for split in SPLITS
        }
    if subwords is not None:
        found = _count_ids(split_path(folder, "train"), subwords.size)
        dictionary, types = subwords.dictionary(found), int(np.count_nonzero(found))
        with atomic_path(folder / TOKENIZER) as temporary:
            temporary.write_text(subwords.tokenizer.to_str(), "utf-8")
    dictionary.save(folder / DICTIONARY)
    match = (
        None
        if subwords is not None
        else recognise(
            {split: facts.tokens for split, facts in splits.items()},
            types,
            corpus.sha256,
        )
    )
    if match is not None:
        say(f"data prepare: {match.line()}")
    TokensMeta(
        dtype="int32",
        vocabulary=len(dictionary),
        types=types,
        dictionary=dictionary.hash,
        splits=splits,
        settings=token_settings(data),
        source=corpus.description,
        edition=match,
        tokenizer=UNSET if subwords is None else subwords.facts,
        others={name: file_hash(folder / name) for name in (DICTIONARY, TOKENIZER) if (folder / name).exists()},
    ).write(folder / META)


def _word_dictionary(corpus: Corpus, data: DataConfig, counts: Counter[str]) -> Dictionary:
    if any(word in counts for word in Dictionary.RESERVED):
        raise _reserved_word(corpus, "train")
    dictionary = given_dictionary(data) or Dictionary.from_counts(
        counts, data.min_count, data.max_words, data.pad_to_multiple
    )
    if not any(dictionary.counts):
        raise DistlmError(
            f"{corpus.places['train']}: no word is left for the dictionary ({len(counts)} distinct words, "
            f"data.min_count={data.min_count}); give more text or a smaller data.min_count"
        )
    return dictionary


def _word_encoder(dictionary: Dictionary) -> Callable[[Iterable[str]], Iterator[Encoded]]:
    return lambda lines: (Encoded(ids, count, len(ids)) for ids, count in encode_lines(lines, dictionary))


def _count_ids(path: Path, size: int) -> npt.NDArray[np.int64]:
    """Occurrences of each id below `size` in a file of ids, in bounded memory."""
    ids, counts = np.memmap(path, DTYPE, "r"), np.zeros(size, np.int64)
    for first in range(0, len(ids), CHUNK):
        counts += np.bincount(ids[first : first + CHUNK], minlength=size)
    return counts


def _write_split(
    folder: Path,
    corpus: Corpus,
    split: str,
    encode: Callable[[Iterable[str]], Iterator[Encoded]],
    advance: Callable[[int], None],
) -> SplitFacts:
    """Encode one split to its file."""
    digest, tokens, lines, unknown, words = xxhash.xxh3_128(), 0, 0, 0, 0
    with atomic_path(split_path(folder, split)) as temporary, temporary.open("wb") as stream:
        for ids, count, of_lines in encode(corpus.read(split)):
            words += of_lines
            # The text held a reserved word exactly when a special id stands where no line ends.
            ends = int((ids < Dictionary.UNK).sum())
            if ends != count:
                raise _reserved_word(corpus, split)
            stream.write(ids.data)
            digest.update(ids.data)
            tokens, lines, unknown = tokens + len(ids), lines + count, unknown + int((ids == Dictionary.UNK).sum())
            advance(count)
    if tokens == 0:
        raise DistlmError(f"{corpus.places[split]}: no lines; the {split} split needs text")
    return SplitFacts(tokens, lines, unknown, digest.hexdigest(), UNSET if words == tokens else words)


def _reserved_word(corpus: Corpus, split: str) -> DistlmError:
    for place, text in corpus.texts(split):
        for word in text.split():
            if word in Dictionary.RESERVED:
                return DistlmError(
                    f"{place()}: the text holds {word!r}, which the token files use "
                    "themselves (every line gets its own </s>); remove or rename it"
                )
    raise RuntimeError(f"{corpus.places[split]}: the text changed while it was read")


def _summary(tokens: TokenFiles, already: bool) -> PrepareSummary:
    meta, edition = tokens.meta, tokens.meta.edition
    return {
        "folder": str(tokens.folder),
        "already": already,
        "tokens": {split: facts.tokens for split, facts in meta.splits.items()},
        "vocabulary": meta.vocabulary,
        "edition": edition.name if edition and edition.exact else None,
    }


def _refuse_foreign(folder: Path) -> None:
    """An unfinished folder may hold what a killed run left, and hidden files; anything else is not ours to touch."""
    ours = {DICTIONARY, TOKENIZER, *(split_path(folder, split).name for split in SPLITS)}
    foreign = sorted(item.name for item in folder.iterdir() if item.name not in ours and not item.name.startswith("."))
    if foreign:
        raise DistlmError(
            f"{folder}: holds files that are not token files ({', '.join(foreign[:3])}); "
            "choose an empty or new folder with data.tokens_dir="
        )


@contextmanager
def _only_writer(folder: Path, stage: Stage) -> Iterator[None]:
    """Hold the folder's lock: runs that share data.tokens_dir and start together prepare it once, in turn."""
    said = False

    def turn() -> None:
        nonlocal said
        if not said:
            say(f"data prepare: waiting for another run that prepares {folder}")
        said = True
        if stage.stop.reason is not None:
            raise Stopped(f"{folder}: stopped while another run prepares it; run the same command again")

    with in_turn(folder / _LOCK, "preparing token files", turn):
        yield
