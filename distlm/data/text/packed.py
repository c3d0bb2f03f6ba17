"""Compressed files as one stream of bytes, read forwards."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from distlm.errors import DistlmError

TOOLS = {".xz": "xz", ".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}
"""Suffix of a compressed file → the program that writes (-c) and reads (-dc) it."""
# zstandard gives all that a piece of this size unpacks to at once.
_PIECE = 1 << 14
_LONGEST_WINDOW = 1 << 31


def packing(name: str) -> str:
    """Suffix of a compressed file's name, one of TOOLS, or ''."""
    return next((suffix for suffix in TOOLS if name.endswith(suffix)), "")


def unpacked(name: str, raw: BinaryIO) -> BinaryIO:
    """The bytes in `raw`, an open file of this name. Raises DistlmError when the library is missing."""
    openers: dict[str, Callable[[BinaryIO], Any]] = {
        "": lambda raw: raw, ".xz": lzma.LZMAFile, ".bz2": bz2.BZ2File,
        ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
        ".zst": lambda raw: io.BufferedReader(_Zstd(raw)),
    }  # fmt: skip
    return cast(BinaryIO, openers[packing(name)](raw))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Errors of reading a file as DistlmError that names it."""
    try:
        yield
    except (lzma.LZMAError, zlib.error, EOFError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # What is wrong inside of a .gz or .bz2 file is an OSError without a number.
        if error.errno is None:
            raise _damaged(path, error) from error
        raise DistlmError(f"{path}: cannot be read ({error})") from error


def _damaged(path: Path, error: Exception) -> DistlmError:
    return DistlmError(f"{path}: damaged or cut compressed file ({error}); get it again")


class _Zstd(io.RawIOBase):
    """Frames of zstd, one behind another. The library's own reader takes a cut file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DistlmError(f".zst files need zstandard: pip install zstandard ({error})") from error
        self._library, self._raw = zstandard, raw
        self._frame: Any = None
        self._given, self._left = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            packed = self._given or self._raw.read(_PIECE)
            if not packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            try:
                self._unpack(packed)
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _unpack(self, packed: bytes) -> None:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor(max_window_size=_LONGEST_WINDOW).decompressobj()
        self._left, self._given = memoryview(self._frame.decompress(packed)), b""
        if self._frame.eof:
            self._given, self._frame = self._frame.unused_data, None
