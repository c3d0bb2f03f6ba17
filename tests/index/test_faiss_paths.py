"""Names that Python has and faiss has not."""

import os
from pathlib import Path

import pytest

from distlm.errors import DistlmError
from distlm.index.faiss_module import for_faiss, require_new
from distlm.index.selfcheck import open_mapped


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.index")
    path.write_bytes(b"")
    for act in (for_faiss, open_mapped):
        with pytest.raises(DistlmError, match=r"\\udcff\.index: faiss takes no name that is no UTF-8; rename it"):
            act(path)
    with pytest.raises(DistlmError, match=r"faiss takes no name"):
        require_new(tmp_path / os.fsdecode(b"\xfe"))
    with pytest.raises(DistlmError, match="is a folder, and a file is needed there"):
        require_new(tmp_path)
    assert for_faiss(tmp_path / "é.index") == f"{tmp_path}/é.index"
