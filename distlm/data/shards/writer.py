"""One shard to disk: text of a unit → ids → rows → a tar file of chunks that is the same in every run."""

import io
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from distlm.data.documents import documents
from distlm.data.shards.files import Chunk, Shard, Unit, id_dtype
from distlm.data.shards.records import ShardSettings, Tokenizer
from distlm.data.shards.rows import RowPacker
from distlm.data.shards.wordpiece import Encoder
from distlm.data.text.source import Source
from distlm.runtime.files import atomic_path, bytes_hash

_TAR_BLOCK = 512


class UnitReader:
    """Gives the documents of units; keeps the source of the last one open, as compressed files are read forwards."""

    def __init__(self, sources: dict[str, list[Source]], rule: str) -> None:
        self._sources, self._rule = sources, rule
        self._open: Source | None = None

    def documents(
        self, unit: Unit, advance: Callable[[int], None] = lambda size: None
    ) -> Generator[tuple[str, bool], None, None]:
        """(text, whether a document ends with it) in order; `advance` is told bytes of text."""
        for segment in unit.segments:
            source = self._sources[unit.split][segment.source]
            if self._open is not source:
                self.close()
                self._open = source
            yield from documents(source.lines(segment, advance), source.rule(self._rule))

    def close(self) -> None:
        """Let go of the open source."""
        if self._open is not None:
            self._open.close()
            self._open = None


def write_shard(
    folder: Path, unit: Unit, texts: Iterator[tuple[str, bool]], encoder: Encoder, tokenizer: Tokenizer,
    settings: ShardSettings,
) -> Shard:  # fmt: skip
    """Write one shard; `texts` are its documents. Holds some chunks of rows in memory.

    The file appears whole or not at all. Raises DistlmError for a full disk or a folder that cannot be written.
    """
    packer = RowPacker(settings.row_tokens, tokenizer, settings.cross_documents, id_dtype(tokenizer.vocabulary))
    path = folder / f"{unit.name}.tar"
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        file = _ShardFile(stream, unit.name, settings.chunk_rows)
        for text, ends in texts:
            packer.add(encoder.encode(text), ends)
            if packer.ready > settings.chunk_rows:
                file.put(packer.rows())
        file.put(packer.rows(last=True))
        file.close()
    return Shard(unit.name, file.size, file.digest.hexdigest(), packer.tokens, packer.documents, tuple(file.chunks))


class _ShardFile:
    """Chunks into a tar file through webdataset's writer: what it writes depends on the rows alone."""

    def __init__(self, stream: BinaryIO, name: str, chunk_rows: int) -> None:
        from webdataset.writer import TarWriter

        self._stream, self._name, self._chunk_rows = stream, name, chunk_rows
        self.digest, self.size = xxhash.xxh3_128(), 0
        self.chunks: list[Chunk] = []
        self._held: list[npt.NDArray[np.integer]] = []
        self._offset = 0
        self._tar = TarWriter(self, user="distlm", group="distlm", mtime=0, encoder=False)

    def write(self, data: bytes) -> int:
        """The stream that TarWriter sees."""
        self.digest.update(data)
        self.size += len(data)
        return self._stream.write(data)

    def put(self, rows: npt.NDArray[np.integer]) -> None:
        """The next rows."""
        self._held.append(rows)
        if sum(map(len, self._held)) < self._chunk_rows:
            return
        whole = np.concatenate(self._held)
        full = len(whole) - len(whole) % self._chunk_rows
        for first in range(0, full, self._chunk_rows):
            self._add(whole[first : first + self._chunk_rows])
        self._held = [whole[full:]]

    def close(self) -> None:
        """Write the last, shorter chunk and the tar's end."""
        rest: Sequence[npt.NDArray[np.integer]] = [part for part in self._held if len(part)]
        if rest:
            self._add(np.concatenate(rest))
        self._tar.close()

    def _add(self, rows: npt.NDArray[np.integer]) -> None:
        array = io.BytesIO()
        np.save(array, rows)
        data = array.getvalue()
        self._tar.write({"__key__": f"{self._name}-{len(self.chunks):05d}", "npy": data})
        # A ustar entry is a header block and the data, padded to whole blocks.
        self.chunks.append(Chunk(self._offset + _TAR_BLOCK, len(data), len(rows), bytes_hash(data)))
        self._offset += _TAR_BLOCK * (1 + -(-len(data) // _TAR_BLOCK))
