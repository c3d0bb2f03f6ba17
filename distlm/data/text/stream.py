"""A file's text as bytes: unpacked, without a byte order mark, and with newlines where it has only CR."""

import codecs
import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from distlm.data.text.packed import TOOLS, packing, readable, unpacked
from distlm.errors import DistlmError

BLOCK = 1 << 17
"""Bytes read at once. Larger pieces are slower: each is fetched from the system anew."""
# Longer ones first: UTF-32's begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_FIRST = 4096


class _Begin(NamedTuple):
    """What the start of a text says about it."""

    mark: int
    """Bytes of its byte order mark."""
    cr: bool
    """Lines end in CR alone."""


class Hashed:
    """An open file; `digest` is of what was read of it, `size` its bytes."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self.digest, self.size = raw, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        block = self._raw.read(size)
        self.digest.update(block)
        self.size += len(block)
        return block

    def finish(self) -> str:
        """Read what is left; sha256 of the whole file."""
        while self.read(BLOCK):
            pass
        return self.digest.hexdigest()


class TextStream:
    """The text of one file. Places are bytes of the unpacked text behind a byte order mark.

    A file is one of CR-only lines when it has CR and no newline at all; CR LF stays as it is. Raises DistlmError,
    naming the file and what converts it, when the text is UTF-16 or UTF-32; and for a damaged compressed file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin: _Begin | None = None
        self._file: BinaryIO | None = None
        self._raw: BinaryIO | None = None
        self._at = 0
        self.sha256 = ""

    def read_at(self, place: int, size: int) -> bytes:
        """Up to `size` bytes from `place` on; empty at the end. Going back in a compressed file starts it over."""
        with readable(self.path):
            if self._file is None or (place < self._at and packing(self.path.name)):
                self._reopen()
            assert self._file is not None
            if place != self._at:
                self._go(self._file, place)
            block = self._file.read(size)
        self._at += len(block)
        return self._lines(block)

    def blocks(self) -> Iterator[bytes]:
        """The whole text from its start; `sha256` is the file's behind the last one."""
        begin = self._look()
        with readable(self.path), self.path.open("rb") as opened:
            raw = Hashed(opened)
            file = unpacked(self.path.name, cast(BinaryIO, raw))
            file.read(begin.mark)
            while block := file.read(BLOCK):
                yield self._lines(block)
            self.sha256 = raw.finish()

    def part(self, start: int, size: int) -> Iterator[bytes]:
        """The `size` bytes from `start` on, less where the text ends before."""
        end = start + size
        while start < end and (block := self.read_at(start, min(BLOCK, end - start))):
            start += len(block)
            yield block

    def close(self) -> None:
        """Let go of the open file."""
        for file in (self._file, self._raw):
            if file is not None:
                file.close()
        self._file = self._raw = None

    def _reopen(self) -> None:
        begin = self._look()
        self.close()
        self._raw = self.path.open("rb")
        self._file = unpacked(self.path.name, self._raw)
        self._at = 0
        self._file.read(begin.mark)

    def _go(self, file: BinaryIO, place: int) -> None:
        if not packing(self.path.name):
            file.seek(self._look().mark + place)
            self._at = place
        while self._at < place and (block := file.read(min(BLOCK, place - self._at))):
            self._at += len(block)

    def _lines(self, block: bytes) -> bytes:
        return block.replace(b"\r", b"\n") if self._look().cr else block

    def _look(self) -> _Begin:
        if self._begin is None:
            with readable(self.path), self.path.open("rb") as raw:
                self._begin = self._begin_of(unpacked(self.path.name, raw))
        return self._begin

    def _begin_of(self, file: BinaryIO) -> _Begin:
        block = file.read(BLOCK)
        if found := _other_encoding(block[:_FIRST]):
            raise DistlmError(f"{self.path}: {found[0]} text, not UTF-8; convert it: {rewriting(self.path, found[1])}")
        mark = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
        cr = False
        while block and b"\n" not in block:
            cr = cr or b"\r" in block
            block = file.read(BLOCK)
        return _Begin(mark, cr and not block)


def _other_encoding(start: bytes) -> tuple[str, str] | None:
    """Name of the encoding and the program that converts it, when a text begins as one of UTF-16 or UTF-32."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name, _iconv(name)
    # Without a mark: mostly Latin letters, of which every other byte is zero.
    for order, zero in (("LE", 1), ("BE", 0)):
        zeros, others = start[zero::2], start[1 - zero :: 2]
        if len(zeros) > 1 and zeros.count(0) > 0.7 * len(zeros) and not others.count(0):
            return f"UTF-16{order}", _iconv(f"UTF-16{order}")
    return None


def rewriting(path: Path, program: str) -> str:
    """A shell command that puts a file's text through a program, in place."""
    name, made, tool = shlex.quote(str(path)), shlex.quote(f"{path}.new"), TOOLS.get(packing(path.name))
    if tool is None:
        return f"{program} < {name} > {made} && mv {made} {name}"
    return f"{tool} -dc < {name} | {program} | {tool} -c > {made} && mv {made} {name}"


def _iconv(encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8"


def not_utf8(path: Path, line: int, byte: int, column: int | None = None) -> DistlmError:
    """The error for bytes that are not UTF-8."""
    where = f" at column {column}" if column else ""
    return DistlmError(
        f"{path}, line {line}: not UTF-8 text (byte 0x{byte:02x}{where}); convert the file, e.g. if it is Latin-1: "
        f"{rewriting(path, _iconv('LATIN1'))}"
    )


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a small UTF-8 file as they are, cut at newlines only; a last line without one counts.

    Raises DistlmError naming the line for bytes that are not UTF-8.
    """
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield raw.removesuffix(b"\n").decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(path, number, raw[error.start], error.start + 1) from error


def whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that end with a newline, the last one where the text ends."""
    held: list[bytes] = []
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if not end:
            held.append(block)
            continue
        yield b"".join([*held, block[:end]])
        held = [block[end:]] if end < len(block) else []
    if held:
        yield b"".join(held)


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with readable(path), path.open("rb") as raw:
        return Hashed(raw).finish()
