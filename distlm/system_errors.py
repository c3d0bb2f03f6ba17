"""What the system refuses, in one line: which file, the system's reason, and what helps.

Python, numpy, safetensors and faiss each report a failed write in another way; `reason` reads them all.
"""

import errno
import io
import os
import re
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distlm.errors import DistlmError

AGAIN = "mend the disk and run the same command again"
_AGAIN = "and run the same command again"
_MENDS = {
    errno.ENOSPC: ("no space left on the disk", f"free some {_AGAIN}"),
    errno.EDQUOT: ("disk quota exceeded", f"free some space, or have the quota raised, {_AGAIN}"),
    errno.EFBIG: ("file too large", f"raise the limit on a file's size (`ulimit -f`, or the file system's) {_AGAIN}"),
    errno.EROFS: ("read-only file system", "choose another place, or mount it for writing"),
    errno.EACCES: ("permission denied", "choose another place, or have its permissions changed"),
    errno.EPERM: ("operation not permitted", "choose another place, or have its permissions changed"),
    errno.EIO: ("input/output error", f"the disk or its server fails: mend it {_AGAIN}"),
    errno.EMFILE: ("too many open files", f"raise the limit of a process (`ulimit -n`) {_AGAIN}"),
    errno.ENOMEM: ("cannot allocate memory", f"give the process more memory, or end others on this machine, {_AGAIN}"),
    errno.ENAMETOOLONG: ("file name too long", "choose a shorter one"),
    errno.ELOOP: ("a link that leads back to itself", "remove it or choose another"),
}  # fmt: skip
"""Number of an error → what it is called, and what helps."""
_UNKNOWN = -1
_MENDS[_UNKNOWN] = ("could not be opened", "run the same command again")
"""Why a library could not open a file that can be opened a moment later."""
_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Numbers that say of a file that it is not there."""
_IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""safetensors, which is written in Rust, has the number of an error in its text."""
_SHORT_WRITE = re.compile(r"(\d+) requested and (\d+) written")
"""numpy says how many numbers it wrote, and nothing else."""


@contextmanager
def told(path: Path, *own: Path) -> Iterator[None]:
    """For the block, what the system refuses is a DistlmError about the file that it names; about `path` where it names
    none, or one of `own`. Errors of libraries that hold the system's reason are such, too."""
    try:
        yield
    except DistlmError:
        raise
    except Exception as error:
        if of_system(error, path):
            raise system_error(error, path, *own) from error
        raise


def system_error(error: Exception, path: Path | None = None, *own: Path) -> DistlmError:
    """One line: the file that `error` names, the system's reason and what helps.

    `path`: the file where it names none, or one that begins as one of `own`, names that no user knows.
    """
    named = getattr(error, "filename", None)
    if isinstance(named, str | bytes | os.PathLike):
        found = Path(os.fsdecode(named))
        path = found if path is None or not any(str(found).startswith(str(name)) for name in own) else path
    elif (at := _at_work(error)) is not None and (path is None or path in at.parents):
        path = at if not any(str(at).startswith(str(name)) for name in own) else path
    if path is not None:
        error = _opened_again(error, path)
    what, mend = reason(error, path)
    if path is not None and (blocking := _file_in_the_way(error, path)):
        below = "" if blocking == path else f" ({path})"
        path, what, mend = blocking, f"is a file, and a folder is needed there{below}", "remove it or choose another"
    made = DistlmError(f"{'' if path is None else f'{path}: '}{what}{f'; {mend}' if mend else ''}")
    made.__cause__ = error
    return made


def refuse(error: Exception, path: Path) -> None:
    """Raise a DistlmError where the system refused to read `path`, which says nothing of what is in it. Returns where
    the file is missing or not what it should be: the caller knows what helps then."""
    error = _opened_again(error, path)
    code = number_of(error, path)
    if code is not None and code not in _OF_THE_FILE:
        raise system_error(error, path) from error


def of_system(error: Exception, path: Path | None = None) -> bool:
    """Whether the system refused something: not so the OSErrors without a number that Hugging Face raises."""
    return number_of(error, path) is not None


def reason(error: Exception, path: Path | None = None) -> tuple[str, str]:
    """What `error` is called, and what helps, which may be empty. `path`: what was written when it came."""
    code = number_of(error, path)
    if code is None:
        return str(error) or type(error).__name__, ""
    return _MENDS.get(code, (os.strerror(code)[:1].lower() + os.strerror(code)[1:], ""))


def number_of(error: Exception, path: Path | None = None) -> int | None:
    """The system's number of an error (errno.ENOSPC, …), of whichever library it is; None: it is not of the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop from"):
        # Of Path.resolve, up to Python 3.12.
        return errno.ELOOP
    if found := _IN_TEXT.search(text):
        return int(found[1])
    for code in _MENDS:
        # faiss, which is written in C++, has the system's words.
        if os.strerror(code) in text:
            return code
    if isinstance(error, OSError) and _SHORT_WRITE.search(text):
        return errno.EFBIG if path is not None and _at_limit(path) else errno.ENOSPC
    return None


def _at_limit(path: Path) -> bool:
    """Whether a file, or the one that is being written in its place, is as large as this process may make one."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    # The disk may be full, too; then there is no room for a file of that size.
    files = os.statvfs(path.parent) if path.parent.is_dir() else None
    return files is not None and files.f_bavail * files.f_frsize > 0


def _at_work(error: Exception) -> Path | None:
    """The file that the code was at: errors of reads and writes name none, and are told far from where they came up.

    It is what the innermost function has that has any, an open file before a path.
    """
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        held = [*frame.f_locals.values()]
        names = [getattr(value, "name", None) for value in held if isinstance(value, io.IOBase)]
        found = [Path(name) for name in names if isinstance(name, str)] or [p for p in held if isinstance(p, Path)]
        if found:
            return next((path for path in found if os.path.isfile(path)), found[0])  # noqa: PTH113 (it raises nothing)
    return None


def _opened_again(error: Exception, path: Path) -> Exception:
    """safetensors says of every file that it cannot open that there is none: why it was, as far as that is so still."""
    if isinstance(error, FileNotFoundError) and error.errno is None:
        try:
            if not path.is_dir():
                path.open("rb").close()
        except OSError as real:
            return real
        return OSError(_UNKNOWN, "")
    return error


def _file_in_the_way(error: Exception, path: Path) -> Path | None:
    """The file that is where a folder should be, of the errors that this gives."""
    if not isinstance(error, FileExistsError | NotADirectoryError):
        return None
    return next((place for place in (path, *path.parents) if place.is_file()), None)
