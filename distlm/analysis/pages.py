"""The pages: templates of one file without external parts."""

from collections.abc import Callable
from importlib.resources import files

import jinja2

from distlm.knnlm.evaluate.table import self_test_words
from distlm.knnlm.generate.stage import marked
from distlm.runtime.files import format_bytes
from distlm.runtime.progress import format_seconds


def environment() -> jinja2.Environment:
    """Templates by file name; text is escaped, an unknown name is an error."""
    source = files("distlm.analysis.templates")
    made = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (source / name).read_text("utf-8")),
    )  # fmt: skip
    filters: dict[str, Callable[..., str]] = {
        "bytes": format_bytes, "seconds": format_seconds, "count": lambda n: f"{n:,}", "self_test": self_test_words,
        "marked": marked, "percent": _percent, "hundredths": _hundredths,
    }  # fmt: skip
    made.filters |= filters
    return made


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _hundredths(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
