"""Train, add and merge in one stage, and what an index folder holds."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from distlm.errors import DistlmError
from distlm.index.build.add import run_index_add
from distlm.index.build.template import run_index_train
from distlm.index.layout import IndexFolder
from distlm.index.merge.stage import MergeSummary, run_index_merge
from distlm.index.records import IndexRecord, TemplateRecord
from distlm.runtime.stage import Stage


class BuildSummary(MergeSummary):
    """What the stage prints, and of each step the seconds."""

    nlist: int
    train_s: float
    add_s: float
    merge_s: float


def run_index_build(stage: Stage) -> BuildSummary:
    """Train, add and merge; finished steps are passed over."""
    start = time.monotonic()
    trained = run_index_train(stage)
    added = run_index_add(stage)
    merged = run_index_merge(stage)
    merged.pop("done_before", None)
    return {
        **merged, "nlist": trained["nlist"], "train_s": trained["seconds"], "add_s": added["seconds"],
        "merge_s": merged["seconds"], "seconds": time.monotonic() - start,
    }  # fmt: skip


@dataclass(frozen=True)
class PartFiles:
    """Parts that are there and whole."""

    count: int
    bytes: int


@dataclass(frozen=True)
class IndexInfo:
    """What an index folder holds."""

    folder: Path
    template: TemplateRecord
    parts: PartFiles
    index: IndexRecord | None
    """None while it is unfinished."""

    def tree(self) -> dict[str, object]:
        """As JSON."""
        head = {"folder": str(self.folder), "template": self.template.tree(), "parts": asdict(self.parts)}
        if self.index is None:
            return {**head, "finished": False}
        return {**head, "finished": True, "index": self.index.tree()}


def index_info(folder: Path) -> IndexInfo:
    """What an index folder holds. Raises DistlmError when there is no template in it."""
    files = IndexFolder(folder)
    if not files.template_json.exists():
        raise DistlmError(f"{folder}: no index here (no template.json); run `distlm index build` first")
    parts = [path for path in files.parts.glob("part-*.index") if path.with_suffix(".json").exists()]
    return IndexInfo(
        folder,
        TemplateRecord.read(files.template_json),
        PartFiles(len(parts), sum(path.stat().st_size for path in parts)),
        IndexRecord.read(files.index_json) if files.index_json.exists() else None,
    )
