"""Train, add and merge in one stage, and what an index folder holds."""

import time
from pathlib import Path
from typing import Any

from distlm.errors import DistlmError
from distlm.index.build.add import run_index_add
from distlm.index.layout import IndexFolder
from distlm.index.merge.stage import run_index_merge
from distlm.index.build.template import run_index_train
from distlm.runtime.files import read_json
from distlm.runtime.stage import Stage


def run_index_build(stage: Stage) -> dict[str, Any]:
    """Train, add and merge; finished steps are passed over. Returns each one's seconds, rows, bytes, self_found."""
    start = time.monotonic()
    trained = run_index_train(stage)
    added = run_index_add(stage)
    merged = run_index_merge(stage)
    seconds = {"train_s": trained["seconds"], "add_s": added["seconds"], "merge_s": merged["seconds"]}
    merged.pop("done_before", None)
    return {**merged, "nlist": trained["nlist"], **seconds, "seconds": time.monotonic() - start}


def index_info(folder: Path) -> dict[str, Any]:
    """What an index folder holds: the template, how many parts are there, and the merged index if finished.

    Raises DistlmError when there is no template in it.
    """
    files = IndexFolder(folder)
    if not files.template_json.exists():
        raise DistlmError(f"{folder}: no index here (no template.json); run `distlm index build` first")
    info: dict[str, Any] = {"folder": str(folder), "template": read_json(files.template_json, "index template")}
    parts = [path for path in files.parts.glob("part-*.index") if path.with_suffix(".json").exists()]
    info["parts"] = {"count": len(parts), "bytes": sum(path.stat().st_size for path in parts)}
    finished = files.index_json.exists()
    info["finished"] = finished
    if finished:
        info["index"] = read_json(files.index_json, "index record")
    return info
