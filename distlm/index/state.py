"""Whether an index is finished, and whose it is."""

from pathlib import Path

from distlm.datastore.reader import Datastore
from distlm.errors import DistlmError
from distlm.index.build.template import Template
from distlm.index.layout import IndexFolder
from distlm.index.records import IndexRecord, PartRecord
from distlm.runtime.checked import Written


def finished_record(folder: IndexFolder) -> IndexRecord:
    """index.json. Raises DistlmError when the index is unfinished."""
    if not folder.index_json.exists():
        raise DistlmError(f"{folder.root}: no finished index (no index.json); run `distlm index build` first")
    return IndexRecord.read(folder.index_json)


def read_index_record(folder: IndexFolder, datastore: Datastore) -> IndexRecord:
    """index.json, checked against the store and the sizes of its files.

    Raises DistlmError when the index is unfinished, of another store, or truncated.
    """
    record = finished_record(folder)
    if record.datastore != datastore.fingerprint:
        raise DistlmError(
            f"{folder.index_json}: index of another store (it was built from {record.datastore}, this store is "
            f"{datastore.fingerprint}); build the index of this store in another run_dir="
        )
    if not record.merged:
        _check_parts(folder, datastore, record)
        return record
    size = folder.merged.stat().st_size if folder.merged.exists() else 0
    if size != record.bytes:
        raise DistlmError(
            f"{folder.merged}: {size} bytes, index.json says {record.bytes}; the file is damaged: remove "
            f"{folder.index_json} and run `distlm index build` again"
        )
    return record


def _check_parts(folder: IndexFolder, datastore: Datastore, record: IndexRecord) -> None:
    paths = [folder.part(shard.index) for shard in datastore.shards]
    size = sum(path.stat().st_size for path in paths if path.exists())
    if size != record.bytes:
        raise DistlmError(
            f"{folder.parts}: the parts have {size} bytes, index.json says {record.bytes}; one is missing or "
            f"damaged: remove {folder.index_json} and run `distlm index build` again"
        )


def written(folder: IndexFolder, record: IndexRecord) -> list[Written]:
    """The files that a search reads, as they were written: the merged file, or template and parts."""
    mend = f"remove {folder.index_json} and run `distlm index build` again"
    if record.merged:
        return [Written(folder.merged, record.xxh3, f"copy it again, or {mend}")]
    return written_parts(folder, record.template)


def written_parts(folder: IndexFolder, template: str) -> list[Written]:
    """The template, whose checksum is its id, and all parts as they were written."""
    sidecars = [PartRecord.read(path) for path in sorted(folder.parts.glob("part-*.json"))]
    anew = "delete it with its .json and index.json, and run `distlm index build` again"
    return [
        Written(folder.template, template, f"remove {folder.root} and run `distlm index build` again"),
        *(Written(folder.part(part.shard), part.xxh3, anew) for part in sidecars),
    ]


def written_index(root: Path) -> list[Written]:
    """The same of a finished index by its folder. Raises DistlmError when it is unfinished."""
    folder = IndexFolder(root)
    return written(folder, finished_record(folder))


def merged_before(folder: IndexFolder, datastore: Datastore, template: Template) -> IndexRecord | None:
    """index.json of a finished index, None when it is not finished.

    Raises DistlmError when it is of another store or another template, or damaged.
    """
    if not folder.index_json.exists():
        return None
    record = read_index_record(folder, datastore)
    if record.template != template.id:
        raise DistlmError(
            f"{folder.index_json}: index of another template (it has {record.template}, template.json says "
            f"{template.id}); remove {folder.root} and build again"
        )
    return record
