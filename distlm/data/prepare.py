"""The stage `distlm data prepare`: count the words of train, build the dictionary, encode each split, then meta.json.

Rank 0 works, the others wait: WikiText-103 takes about a minute. The text is streamed twice and not altered.
Files: {train,valid,test}.bin, dict.txt and, last, meta.json; a killed run leaves no meta.json and starts over.
"""

import fcntl
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import TypedDict

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import UNSET

from distlm.config.schema import DataConfig, RunConfig
from distlm.data.corpus import Corpus, folder_files, open_corpus
from distlm.data.dictionary import Dictionary
from distlm.data.editions import recognise
from distlm.data.records import SplitFacts, TokenSettings, TokensMeta
from distlm.data.subwords import TOKENIZER, Encoded, Subwords
from distlm.data.tokens import DICTIONARY, DTYPE, META, SPLITS, TokenFiles, split_path
from distlm.errors import DistlmError, Stopped
from distlm.runtime.files import atomic_path, require_free_disk, sweep_temporaries
from distlm.runtime.metrics import STAGE_SECONDS, TOKENS_PER_S
from distlm.runtime.plan import StagePlan
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage

CHUNK = 1 << 20
"""Ids encoded before they are written (and words counted at once)."""
_LOCK = ".prepare.lock"
# For plans: tokens per byte are measured on this much of train, and may be this much higher in the rest.
_SAMPLE, _MARGIN = 1 << 20, 1.1
_TOKENS_PER_SECOND = 2e6
_DEMO_TOKENS = 530_000
# Python with NumPy, plus the longest-lived chunk; then the counter and the dictionary, per distinct word.
_BASE_MEMORY, _MEMORY_PER_TYPE = 160_000_000, 400


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


def plan_prepare(config: RunConfig, ranks: int = 1) -> StagePlan:
    """Needs of the stage, estimated from file sizes and the start of train. One rank works, whatever `ranks` is."""
    data, folder = config.data, RunDir.of(config).tokens(config)
    if finished_tokens(folder, data) is not None:
        return StagePlan("data prepare", f"{folder}: complete, nothing to do", 0, _BASE_MEMORY, 0.0)
    notes = ["one rank works, the others wait"] if ranks > 1 else []
    if data.source == "hub":
        notes.append("the size of a hub data set is known only when it is loaded; disk is checked then")
        return StagePlan("data prepare", f"text of {data.hub_name} to {folder}", 0, 2 * _BASE_MEMORY, None, notes)
    if data.source == "demo":
        text, tokens = "the demo corpus", _DEMO_TOKENS
    else:
        text, tokens = data.text_dir, _estimate_tokens(folder_files(data.text_dir), data)
    return StagePlan(
        "data prepare",
        f"{text} to {folder}, about {tokens:,} tokens",
        disk_bytes=int(tokens * _MARGIN) * DTYPE.itemsize,
        memory_bytes=_BASE_MEMORY + _MEMORY_PER_TYPE * int(100 * sqrt(tokens)),
        seconds=2 + tokens / _TOKENS_PER_SECOND,
        notes=notes,
    )


def finished_tokens(folder: Path, data: DataConfig) -> TokenFiles | None:
    """The token files of these settings, or None when the folder is not (completely) prepared.

    Raises DistlmError when it was prepared with other settings, or the text files have changed in size since.
    """
    if not (folder / META).exists():
        return None
    tokens = TokenFiles.open(folder)
    settings = _settings(data)
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
    for facts in (tokens.meta.source.files or {}).values():
        path = Path(settings.text_dir or "") / facts.name
        if path.is_file() and path.stat().st_size != facts.bytes:
            raise DistlmError(
                f"{path}: has {path.stat().st_size} bytes, and had {facts.bytes} when {folder} was prepared; "
                f"put the old text back, or choose another data.tokens_dir or run_dir"
            )
    return tokens


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


def _estimate_tokens(files: Mapping[str, Path], data: DataConfig) -> int:
    with files["train"].open("rb") as stream:
        sample = stream.read(_SAMPLE)
    count = len(sample.split()) + sample.count(b"\n")
    if data.tokenizer:
        lines = sample.decode("utf-8", "replace").split("\n")
        count = round(Subwords.load(data.tokenizer, data.line_end).tokens_per_line(lines) * len(lines))
    per_byte = count / len(sample)
    return int(per_byte * sum(path.stat().st_size for path in files.values()))


def _prepare(stage: Stage) -> PrepareSummary:
    data, folder = stage.config.data, stage.run.tokens(stage.config)
    if folder.exists() and not folder.is_dir():
        raise DistlmError(f"{folder}: token files need a folder, and this is a file; choose another data.tokens_dir")
    # First without the lock: a finished folder may be read-only.
    finished = finished_tokens(folder, data)
    if finished is not None:
        return _nothing_to_do(finished)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder, stage):
        finished = finished_tokens(folder, data)
        if finished is not None:
            return _nothing_to_do(finished)
        _refuse_foreign(folder)
        sweep_temporaries(folder)
        start = time.monotonic()
        _write(stage, folder, open_corpus(data))
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


def _write(stage: Stage, folder: Path, corpus: Corpus) -> None:
    data = stage.config.data
    subwords = Subwords.load(data.tokenizer, data.line_end) if data.tokenizer else None
    total = sum(corpus.lines.values()) + (corpus.lines["train"] if subwords is None else 0)
    with Progress("data prepare", total, "lines") as progress:

        def advance(lines: int, doing: str) -> None:
            progress.advance(lines, doing=doing)
            if stage.stop.reason is not None:
                raise Stopped(f"{folder}: stopped while preparing tokens; the same command starts the stage over")

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
    files = corpus.description.files
    match = (
        None
        if subwords is not None
        else recognise(
            {split: facts.tokens for split, facts in splits.items()},
            types,
            {split: files[split].sha256 for split in SPLITS} if files else None,
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
        settings=_settings(data),
        source=corpus.description,
        edition=match,
        tokenizer=UNSET if subwords is None else subwords.facts,
    ).write(folder / META)


def _word_dictionary(corpus: Corpus, data: DataConfig, counts: Counter[str]) -> Dictionary:
    if any(word in counts for word in Dictionary.RESERVED):
        raise _reserved_word(corpus, "train")
    dictionary = _given_dictionary(data) or Dictionary.from_counts(
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
    for number, line in enumerate(corpus.read(split), 1):
        for word in line.split():
            if word in Dictionary.RESERVED:
                return DistlmError(
                    f"{corpus.places[split]}, line {number}: the text holds {word!r}, which the token files use "
                    "themselves (every line gets its own </s>); remove or rename it"
                )
    raise RuntimeError(f"{corpus.places[split]}: the text changed while it was read")


def _settings(data: DataConfig) -> TokenSettings:
    """The settings that decide the token files, for this source."""
    settings = TokenSettings(data.source)
    if data.source == "folder":
        settings.text_dir = str(Path(data.text_dir).resolve())
    elif data.source == "hub":
        settings.hub_name, settings.hub_config, settings.hub_field = data.hub_name, data.hub_config, data.hub_field
    if data.tokenizer:
        settings.tokenizer = Subwords.load(data.tokenizer, data.line_end).hash
    elif given := _given_dictionary(data):
        settings.dictionary = given.hash
    else:
        settings.min_count, settings.max_words = data.min_count, data.max_words
        settings.pad_to_multiple = data.pad_to_multiple
    return settings


def _given_dictionary(data: DataConfig) -> Dictionary | None:
    """The dictionary of data.dictionary, if that is set."""
    if not data.dictionary:
        return None
    if not Path(data.dictionary).is_file():
        raise DistlmError(f"data.dictionary={data.dictionary}: no such file")
    return Dictionary.load(Path(data.dictionary))


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
    with (folder / _LOCK).open("w") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    say(f"data prepare: waiting for another run that prepares {folder}")
                waiting = True
            except OSError:  # a file system without locks: go on as if alone
                break
            if stage.stop.reason is not None:
                raise Stopped(f"{folder}: stopped while another run prepares it; run the same command again")
            time.sleep(0.2)
        yield
