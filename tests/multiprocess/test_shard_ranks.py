"""`distlm data shard` on three ranks: the bytes of one rank, and one error for all."""

import lzma
from pathlib import Path

import pytest
from support import distlm, write_text
from support.shards import SMALL, hashes, make_shards, manifest

pytestmark = pytest.mark.multiprocess


def test_three_ranks_write_the_bytes_of_one_and_fail_together(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", train_lines=1000)
    # A packed file is read by each rank from its start to its own shards.
    train = (text / "train.txt").read_bytes()
    (text / "train.txt").unlink()
    (text / "train.txt.xz").write_bytes(lzma.compress(train))
    # The valid split is documents of train, which each rank finds alike.
    (text / "valid.txt").unlink()
    command = ["data", "shard", "plm-base", f"shards.text_dir={text}", "launch.threads=1"]
    command += [f"shards.{name}={value}" for name, value in {**SMALL, "valid_share": 0.1}.items()]
    done = distlm(*command, f"run_dir={tmp_path / 'three'}", ranks=3)
    assert "train_rows=" in done.stdout
    make_shards(tmp_path / "one", text, valid_share=0.1)
    assert hashes(tmp_path / "three/shards") == hashes(tmp_path / "one/shards")
    assert len(manifest(tmp_path / "one/shards")["splits"]["train"]["shards"]) >= 7

    (text / "test.txt").write_bytes(b"fine\n\xff\n")
    failed = distlm(*command, f"run_dir={tmp_path / 'bad'}", ranks=2, check=False)
    assert failed.returncode == 1
    assert failed.stderr.count("test.txt, line 2: not UTF-8") == 1
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "bad/shards/manifest.json").exists()
