"""A byte that rots in any file with results is found by `distlm verify`, and before a stage prints a number from it."""

import random
import shutil
from pathlib import Path

import pytest
from support import shared

from distlm.errors import DistlmError
from distlm.runtime.ranks.comm import SingleComm
from distlm.verify import parts_below, verify

FOR_PEOPLE = {"config.yaml", "metrics.jsonl", "report.html"}
"""What has no checksum: the user's own, the record of what was measured (each line is checked by itself), a view."""


def rotten(root: Path) -> list[str]:
    try:
        parts = parts_below(root)
    except DistlmError as error:
        return [str(error)]
    return verify(SingleComm(), root, parts)


def results_of(run: Path) -> list[Path]:
    return [
        path for path in sorted(run.rglob("*"))
        if path.is_file() and path.stat().st_size and path.name not in FOR_PEOPLE and path.suffix != ".log"
        and not path.name.startswith(".") and "configs" not in path.parts
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("made", ["searched"])
def test_every_flipped_byte_is_found(made: str, seed: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    config = getattr(shared, made)(tmp_path_factory)
    run = tmp_path / "run"
    shutil.copytree(config.run_dir, run)
    assert rotten(run) == []
    draw, missed = random.Random(seed), []
    for path in results_of(run):
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        if not rotten(run):
            missed.append((str(path.relative_to(run)), place, whole[max(0, place - 8) : place + 8]))
        path.write_bytes(whole)
    assert missed == [] and rotten(run) == []
