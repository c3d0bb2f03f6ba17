"""`distlm index extend`: new keys for a finished index, as a part of their own that merges with it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distlm.errors import DistlmError, UsageError
from distlm.index.build.add import read_batches
from distlm.index.build.encode import Encoder
from distlm.index.build.sample import not_finite
from distlm.index.faiss_module import require_new, write_index
from distlm.index.layout import Array, deserialise
from distlm.index.merge.part_file import open_part
from distlm.index.records import AddedKeys, ExtendRecord
from distlm.index.vectors import open_vectors
from distlm.runtime.files import atomic_path, file_hash, require_free_disk, sweep_abandoned
from distlm.runtime.progress import Progress


def extend_index(index: Path, keys: Sequence[Path], out: Path, first_id: int = -1) -> dict[str, int]:
    """Encode `keys` (.npy files [n, D], float16 or float32) as `index` does, into the part `out`. `index` is only read.

    first_id: id of the first key; −1: the number of keys in `index`, so that both merge without a gap
    (`distlm index merge --parts INDEX OUT --out BIGGER`, which finds ids that are there already).
    Returns rows and first_id. Memory: the part, and two batches of keys. Raises DistlmError for a type that cannot be
    merged, keys of another width, and NaN or infinite values.
    """
    if not keys:
        raise UsageError("index extend --keys: name the .npy files of the new keys")
    require_new(out)
    part = open_part(index)
    first = part.rows if first_id < 0 else first_id
    grown = deserialise(part.state)
    files = [(path, open_vectors(path)) for path in keys]
    for path, vectors in files:
        if vectors.shape[1] != grown.d:
            raise DistlmError(f"{path}: keys of width {vectors.shape[1]}, {index} has keys of width {grown.d}")
    rows = sum(len(vectors) for _, vectors in files)
    sweep_abandoned(out.absolute())
    require_free_disk(out.absolute().parent, rows * (part.code_size + 8) + len(part.state), "the new part")
    done = 0
    with Encoder(grown, keys=rows) as encoder, Progress("index extend", rows, "keys", 0) as progress:
        for path, vectors in files:
            for start, batch in read_batches(vectors, encoder.batch):
                _require_finite(batch, path, start)
                encoder.add(batch, np.arange(first + done, first + done + len(batch), dtype=np.int64))
                done += len(batch)
                progress.advance(len(batch))
    with atomic_path(out) as temporary:
        write_index(grown, temporary)
        digest = file_hash(temporary)
    added = [AddedKeys(str(path.absolute()), len(vectors)) for path, vectors in files]
    record = ExtendRecord(rows=rows, first_id=first, xxh3=digest, extends=str(index.absolute()), keys=added)
    record.write(out.with_name(out.name + ".json"))
    return {"rows": rows, "first_id": first}


def _require_finite(batch: Array, path: Path, start: int) -> None:
    bad = not_finite(batch)
    if len(bad):
        raise DistlmError(
            f"{path}: row {start + int(bad[0])} holds NaN or infinite values; leave it out, or mend its model"
        )
