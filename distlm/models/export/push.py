"""An exported folder goes to a repository of the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlm.errors import DistlmError, UsageError
from distlm.installed import install

_FIRST_FILES = {".gitattributes"}
"""What the hub itself puts into a new repository."""


@dataclass(frozen=True)
class Repository:
    """A repository that a folder can be uploaded to."""

    name: str
    private: bool
    _api: Any

    @classmethod
    def check(cls, name: str, private: bool) -> "Repository":
        """Ask the hub, before any work is spent, who the user is and whether the repository is new or empty.

        Raises UsageError for a name that is none, and DistlmError without huggingface_hub, token, network or right,
        and for a repository that has files.
        """
        if name.count("/") != 1 or not all(name.split("/")):
            raise UsageError(f"--push {name}: name the repository as USER/NAME")
        library = _library()
        found = cls(name, private, library.HfApi())
        with _told(name):
            found._api.whoami()
            files = set(found._api.list_repo_files(name)) if found._api.repo_exists(name) else set()
        if files := files - _FIRST_FILES:
            raise DistlmError(
                f"--push {name}: it has files ({', '.join(sorted(files)[:3])}), and nothing is overwritten; "
                "give a new name, or delete them there"
            )
        return found

    def upload(self, folder: Path) -> str:
        """Make the repository, where it is not there, and upload the folder as one commit; its address."""
        with _told(self.name):
            made = self._api.create_repo(self.name, private=self.private, exist_ok=True)
            self._api.upload_folder(repo_id=self.name, folder_path=folder, commit_message="Model exported by distlm")
        return str(made)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What can go wrong at the hub as one clear line."""
    try:
        yield
    # Its errors are of several libraries, that of HTTP among them.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if type(error).__name__ == "LocalTokenNotFoundError" or status in (401, 403):
            mend = "log in with a token that may write there (`hf auth login`, or HF_TOKEN=...)"
        elif status is None:
            mend = "is the hub reachable from here? If not, export without --push, and upload the folder elsewhere"
        else:
            mend = "the folder can be uploaded by hand (`hf upload`)"
        raise DistlmError(f"--push {name}: {said}; {mend}") from error


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DistlmError(f"--push needs huggingface_hub: {install('hf')} ({error})") from error
    return huggingface_hub
