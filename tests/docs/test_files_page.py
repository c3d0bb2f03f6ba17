"""docs/files.md is what the records say, and every field says what it is."""

from pathlib import Path

import msgspec
import pytest

from distlm.files_page import page, records

PAGE = Path(__file__).resolve().parents[2] / "docs/files.md"


@pytest.fixture(scope="module")
def made() -> str:
    """The page, made anew."""
    return page()


def test_the_page_is_made_from_the_records(made: str) -> None:
    assert PAGE.read_text("utf-8") == made, "run: python -m distlm.files_page > docs/files.md"


def test_every_field_says_what_it_is(made: str) -> None:
    rows = [line for line in made.splitlines() if line.startswith("| `")]
    assert rows and not [row for row in rows if row.endswith("|  |")], "a field without a docstring"


@pytest.mark.parametrize("record", records(), ids=lambda record: record.__name__)
def test_every_record_says_whose_it_is(record: type[msgspec.Struct]) -> None:
    assert record.__doc__ and record.FILE and record.WHAT and record.WRITER  # type: ignore[attr-defined]
