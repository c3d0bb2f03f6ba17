"""The JSON and the table of a check."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu.part import Record


def write_json(path: Path, head: Mapping[str, Any], records: Sequence[Record]) -> None:
    """All that there is so far, in one step: a check that is killed leaves what it had."""
    text = json.dumps({**head, "parts": [asdict(record) for record in records]}, indent=1, ensure_ascii=False)
    begun = path.with_suffix(".json.begun")
    begun.write_text(text + "\n", "utf-8")
    begun.replace(path)


def table(records: Sequence[Record]) -> str:
    """Markdown, a row a part, for docs/results.md."""
    lines = ["| part | verdict | s | figures | |", "|---|---|---|---|---|"]
    for record in records:
        figures = ", ".join(f"{name} {_shown(value)}" for name, value in record.figures.items() if value is not None)
        cells = (record.part, record.verdict, f"{record.seconds:.0f}", figures, record.why.replace("\n", " "))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
