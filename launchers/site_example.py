"""The shipped site file and sbatch scripts: in slurm/ of a source tree, and in a wheel."""

from pathlib import Path

from distlm.errors import DistlmError, UsageError
from distlm.installed import tree


def scripts() -> Path:
    """The folder of the sbatch scripts."""
    return tree() / "slurm"


def init_site(path: Path) -> Path:
    """Write the example as a new site file; returns `path`. Raises UsageError where a file is, DistlmError where none
    can be written."""
    example = (scripts() / "site.example.yaml").read_text("utf-8")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(example)
    except FileExistsError as error:
        raise UsageError(f"{path}: there is a site file; edit it, or name another one") from error
    except OSError as error:
        raise DistlmError(f"{path}: cannot be written: {error.strerror}") from error
    return path
