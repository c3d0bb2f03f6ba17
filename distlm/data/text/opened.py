"""From the settings to the sources of each split, and what splits share."""

import re
from collections.abc import Sequence
from importlib import metadata

from msgspec import structs

from distlm.data.shards.records import TextFacts
from distlm.data.text.choice import TextChoice
from distlm.data.text.folder import folder_sources
from distlm.data.text.hub import column_of, hub_label, hub_tables
from distlm.data.text.rows import TableSource
from distlm.data.text.source import Scan, Segment, Source
from distlm.errors import DistlmError

_TITLE_OF_DEMO = re.compile(r" = [^=].* = ")


def open_sources(choice: TextChoice, one_line: bool = True) -> dict[str, list[Source]]:
    """Split of `choice.read` → its sources, in the order of the text.

    `one_line`: a row that is a document comes as one line, newlines in it as spaces. Raises DistlmError naming the
    setting and the mend.
    """
    if choice.source == "folder":
        return {split: [*files] for split, files in folder_sources(choice, one_line).items()}
    if choice.source == "demo":
        if choice.shares:
            raise DistlmError(
                f"{choice.section}.source=demo has all splits; leave {choice.section}.valid_share and "
                f"{choice.section}.test_share out"
            )
        return _demo_sources(choice.read)
    tables, version = hub_tables(choice), metadata.version("datasets")
    what, whole = hub_label(choice.section, choice.hub_name, choice.hub_config), choice.documents == "whole"

    def facts(split: str) -> TextFacts:
        return TextFacts(
            name=split, hub=choice.hub_name, config=choice.hub_config, field=choice.hub_field, datasets=version,
            sha256="", text=0,
        )  # fmt: skip

    return {
        split: [
            TableSource(
                facts(split), f"{what}, {split}", len(table), column_of(table, choice.hub_field), whole, one_line
            )
        ]
        for split, table in tables.items()
    }


def segments_of(choice: TextChoice, split: str, scans: Sequence[Scan]) -> list[Segment]:
    """The segments of a split; `scans` are of the sources of its origin.

    Raises DistlmError when a share took none of the documents, or all.
    """
    found = [segment for scan in scans for segment in scan.of(split)]
    if found or not choice.shares or choice.origin(split) != "train":
        return found
    shares = " and ".join(f"{choice.section}.{name}_share={share}" for name, share in choice.shares.items())
    raise DistlmError(
        f"{choice.section}: no document of train is in the {split} split with {shares}; give other shares, or see that "
        f"train has many documents: {choice.section}.documents={choice.documents} says where one ends (a row of a data "
        f"set of the hub is one with {choice.section}.documents=whole)"
    )


def _demo_sources(splits: Sequence[str]) -> dict[str, list[Source]]:
    from distlm.data.demo_text import demo_text

    demo = demo_text()
    known = structs.asdict(demo.description)
    # The hash is that of the package's file, and these facts describe its rows.
    del known["sha256"]
    sources: dict[str, list[Source]] = {}
    for split in splits:
        articles: list[list[str]] = []
        for line in demo.lines[split]:
            if _TITLE_OF_DEMO.fullmatch(line) or not articles:
                articles.append([])
            articles[-1].append(line)
        rows = ["\n".join(lines) for lines in articles]
        sources[split] = [
            TableSource(
                TextFacts(name=split, sha256="", text=0, **known), f"demo corpus, {split}", len(rows),
                lambda start, end, rows=rows: iter(rows[start:end]), whole=True,  # type: ignore[misc]
            )
        ]  # fmt: skip
    return sources
