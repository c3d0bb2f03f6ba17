"""`distlm data prepare` on two ranks: one works, both end alike."""

from pathlib import Path

import pytest
from support import distlm, write_text

pytestmark = pytest.mark.multiprocess


def test_two_ranks_write_what_one_writes_and_fail_together(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    source = ["data", "prepare", "demo", "data.source=folder", f"data.text_dir={text}"]
    for ranks in (1, 2):
        distlm(*source, f"run_dir={tmp_path / str(ranks)}", ranks=ranks)
    for name in ("train.bin", "valid.bin", "test.bin", "dict.txt", "meta.json"):
        assert (tmp_path / "1/tokens" / name).read_bytes() == (tmp_path / "2/tokens" / name).read_bytes()
    (text / "valid.txt").write_bytes(b"\xff\n")
    failed = distlm(*source, f"run_dir={tmp_path / 'bad'}", ranks=2, check=False)
    assert failed.returncode == 1
    assert failed.stderr.count("valid.txt, line 1: not UTF-8") == 1
    assert "Traceback" not in failed.stderr
