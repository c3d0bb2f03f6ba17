"""docs/configuration.md is what schema and recipes say, and every setting says what it is."""

from pathlib import Path

from distlm.config.settings import all_sections
from distlm.config_page import page

PAGE = Path(__file__).resolve().parents[2] / "docs/configuration.md"


def test_the_page_is_made_from_the_schema() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m distlm.config_page > docs/configuration.md"


def test_every_section_and_setting_says_what_it_is() -> None:
    text = PAGE.read_text("utf-8")
    for section in all_sections():
        assert section.text, section.name
        for setting in section.settings:
            assert setting.text and f"| `{setting.key}` |" in text, setting.key
