"""The text of token files: the lines of the train, valid and test split, and where they are from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import chain, islice

from distlm.config.schema import DataConfig
from distlm.data.records import HubSource, TextFile, TextSource
from distlm.data.shards.records import TextFacts
from distlm.data.text.choice import TextChoice, choice_of_data
from distlm.data.text.folder import is_columnar
from distlm.data.text.hub import hub_label
from distlm.data.text.opened import open_sources, segments_of
from distlm.data.text.packed import packing
from distlm.data.text.source import Cutting, Scan, Segment, Source
from distlm.data.tokens import SPLITS
from distlm.errors import DistlmError
from distlm.runtime.records import given


@dataclass(frozen=True)
class Corpus:
    """Text of the three splits."""

    description: TextSource
    """What `meta.json` says about the source."""
    lines: Mapping[str, int]
    """Lines of each split; about so many where splits share documents."""
    places: Mapping[str, str]
    """Split → the name that errors show: a file, or a data set and split."""
    read: Callable[[str], Iterator[str]]
    """Split → its lines, without the newline. May be called again."""
    texts: Callable[[str], Iterator[tuple[Callable[[], str], str]]]
    """Split → (what errors call it, text) of each line, or row, of what the split is made of."""
    sha256: Mapping[str, str] | None = None
    """Of each split's text, where each is one plain file."""
    spelled: Mapping[str, int] | None = None
    """Word that was asked for → how often the text has it."""


def open_corpus(
    config: DataConfig, specials: Sequence[str] = (), check: Callable[[int], None] = lambda size: None
) -> Corpus:
    """The corpus that the settings name. All of it is read once here: for its hashes, and to refuse what is no text.

    `specials`: words to count. `check` is told bytes of text as they are read. Raises DistlmError for a missing folder,
    split or library, for an empty split, and naming file and line (or row) for text that cannot be used.
    """
    corpus = _whole_corpus(config, specials, check)
    return _first(corpus, config.first_words) if config.first_words else corpus


def words_of_split(config: DataConfig, split: str) -> int:
    """Words of all of a split's text, one end of each line counted. Reads no other split than the text is taken from.

    Raises DistlmError as open_corpus.
    """
    if config.source == "demo" and not (config.valid_share or config.test_share):
        return _count(_demo_corpus().read(split))
    choice = choice_of_data(config)
    sources = open_sources(choice, one_line=False)[choice.origin(split)]
    scans = _scans(choice, choice.origin(split), sources, (), lambda size: None)
    return _count(_read(sources, segments_of(choice, split, scans)))


def _count(lines: Iterator[str]) -> int:
    return sum(len(line.split()) + 1 for line in lines)


def _first(corpus: Corpus, words: int) -> Corpus:
    """Whole lines from the beginning of each split, of at most `words` words with their ends."""
    lines = {split: _lines_within(corpus.read(split), words) for split in SPLITS}
    for split, kept in lines.items():
        if not kept:
            raise DistlmError(
                f"data.first_words={words}: the first line of {corpus.places[split]} has more words, so that nothing "
                "is kept; choose more"
            )
    # The hashes are of the whole files.
    return replace(corpus, lines=lines, read=lambda split: islice(corpus.read(split), lines[split]), sha256=None)


def _lines_within(lines: Iterator[str], words: int) -> int:
    kept = 0
    for line in lines:
        words -= len(line.split()) + 1
        if words < 0:
            break
        kept += 1
    return kept


def _whole_corpus(config: DataConfig, specials: Sequence[str], check: Callable[[int], None]) -> Corpus:
    if config.source == "demo" and not (config.valid_share or config.test_share):
        return _demo_corpus()
    choice = choice_of_data(config)
    sources = open_sources(choice, one_line=False)
    scans = {split: _scans(choice, split, of, specials, check) for split, of in sources.items()}
    segments = {split: segments_of(choice, split, scans[choice.origin(split)]) for split in SPLITS}
    for split, found in segments.items():
        if not found:
            raise DistlmError(f"{_place(choice, split, sources)}: no lines; the {split} split needs text")
    return Corpus(
        description=_described(choice, {split: [scan.facts for scan in found] for split, found in scans.items()}),
        lines={split: _lines(scans[choice.origin(split)], found) for split, found in segments.items()},
        places={split: _place(choice, split, sources) for split in SPLITS},
        read=lambda split: _read(sources[choice.origin(split)], segments[split]),
        texts=lambda split: chain.from_iterable(source.places() for source in sources[choice.origin(split)]),
        sha256=_sha256(choice, scans),
        spelled=_spelled(scans),
    )


def _scans(
    choice: TextChoice, split: str, sources: Sequence[Source], specials: Sequence[str], check: Callable[[int], None]
) -> list[Scan]:
    return [source.scan(at, _cutting(choice, source, split, specials), check) for at, source in enumerate(sources)]


def _cutting(choice: TextChoice, source: Source, split: str, specials: Sequence[str]) -> Cutting:
    """Uncut, unless other splits take documents of this one."""
    if split != "train" or not choice.shares:
        return Cutting(source.rule("whole"), specials=specials)
    return Cutting(source.rule(choice.documents), shares=choice.shares, specials=specials)


def _read(sources: Sequence[Source], segments: Sequence[Segment]) -> Iterator[str]:
    opened: Source | None = None
    for segment in segments:
        source = sources[segment.source]
        if opened is not None and opened is not source:
            opened.close()
        opened = source
        yield from source.lines(segment, lambda size: None)
    if opened is not None:
        opened.close()


def _lines(scans: Sequence[Scan], segments: Sequence[Segment]) -> int:
    """As many of the lines as of the bytes, which is all of them where nothing is shared."""
    share = sum(segment.bytes for segment in segments) / sum(scan.facts.text for scan in scans)
    return max(1, round(share * sum(scan.lines for scan in scans)))


def _described(choice: TextChoice, facts: Mapping[str, list[TextFacts]]) -> TextSource:
    if choice.source == "hub":
        rows = {split: given(table.rows) for split, (table,) in facts.items()}
        version = metadata.version("datasets")
        return TextSource(
            "hub", hub=HubSource(choice.hub_name, choice.hub_config, choice.hub_field, rows, version)
        )  # fmt: skip
    described = TextSource("folder")
    for split, files in facts.items():
        found = [TextFile(file.name, given(file.bytes), file.sha256) for file in files]
        if found[0].name.startswith(f"{split}/"):
            described.folders = {**(described.folders or {}), split: found}
        else:
            described.files = {**(described.files or {}), split: found[0]}
    return described


def _place(choice: TextChoice, split: str, sources: Mapping[str, Sequence[Source]]) -> str:
    origin = choice.origin(split)
    if choice.source == "hub":
        place = f"{hub_label('data', choice.hub_name, choice.hub_config)}, {origin}"
    else:
        name = sources[origin][0].name
        place = f"{choice.text_dir.rstrip('/')}/{f'{origin}/' if name.startswith(f'{origin}/') else name}"
    return place if origin == split else f"{place} ({split})"


def _sha256(choice: TextChoice, scans: Mapping[str, Sequence[Scan]]) -> dict[str, str] | None:
    facts = {split: found[0].facts for split, found in scans.items() if len(found) == 1}
    plain = choice.source == "folder" and not choice.shares and len(facts) == len(scans)
    if not plain or any(packing(fact.name) or is_columnar(fact.name) for fact in facts.values()):
        return None
    return {split: fact.sha256 for split, fact in facts.items()}


def _spelled(scans: Mapping[str, Sequence[Scan]]) -> dict[str, int]:
    """Over all sources."""
    total: dict[str, int] = {}
    for found in scans.values():
        for scan in found:
            for word, count in scan.spelled.items():
                total[word] = total.get(word, 0) + count
    return total


def _demo_corpus() -> Corpus:
    from distlm.data.demo_text import demo_text

    demo = demo_text()
    return Corpus(
        description=TextSource("demo", demo=demo.description),
        lines={split: len(rows) for split, rows in demo.lines.items()},
        places={split: f"demo corpus, {split}" for split in SPLITS},
        read=lambda split: iter(demo.lines[split]),
        texts=lambda split: (
            (lambda number=number: f"demo corpus, {split}, line {number}", line)  # type: ignore[misc]
            for number, line in enumerate(demo.lines[split], 1)
        ),
    )
