"""docs/files.md is what the records say, and every field says what it is."""

from pathlib import Path

import msgspec
import pytest

from distlm.files_page import page, records

PAGE = Path(__file__).resolve().parents[2] / "docs/files.md"


def test_the_page_is_made_from_the_records() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m distlm.files_page > docs/files.md"


@pytest.mark.parametrize("record", records(), ids=lambda record: record.__name__)
def test_every_record_says_whose_it_is_and_every_field_what_it_is(record: type[msgspec.Struct]) -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert not [row for row in rows if row.endswith("|  |")], "a field without a docstring"
    assert record.__doc__ and record.FILE and record.WHAT and record.WRITER  # type: ignore[attr-defined]
