"""Bad input at the command line: one clear error each, on one line, without a traceback, and nothing overwritten."""

import shutil

import pytest
from support import TINY, distlm, mpirun, shared, write_text
from support.records import alter

FAST = [*TINY, "train.updates=2", "train.valid_every=0", "train.save_every=0", "data.source=folder"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run: (text folder, run folder)."""
    return shared.whole(tmp_path_factory)[:2]


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that a test may damage, and its settings."""
    text, run = finished
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", shared.whole_settings(tmp_path / "run", text)


def refused(*arguments, words, code=1, **keywords):
    done = distlm(*arguments, check=False, **keywords)
    errors = [line for line in done.stderr.splitlines() if "distlm: " in line]
    assert done.returncode == code and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in errors[0] for word in words), errors[0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: (text / "valid.txt").unlink(), ["valid.txt"]),
        (lambda text: (text / "train.txt").write_text("", "utf-8"), ["train.txt", "empty"]),
        (lambda text: (text / "test.txt").write_bytes(b"fine\nnot \xff fine\n"), ["test.txt", "2", "UTF-8"]),
        (lambda text: (text / "test.txt").write_text("all of it\n", "utf-16"), ["test.txt", "UTF-16", "iconv"]),
        (lambda text: (text / "test.txt").write_bytes(b"fine\nn\0t\n"), ["test.txt, line 2", "NUL"]),
        (lambda text: shutil.rmtree(text), ["text"]),
    ],
    ids=["missing split", "empty file", "not UTF-8", "UTF-16", "NUL", "missing folder"],
)
def test_text(damage, words, tmp_path):
    text = write_text(tmp_path / "text", train_lines=50)
    damage(text)
    refused("data", "prepare", "demo", *FAST, f"data.text_dir={text}", f"run_dir={tmp_path / 'run'}", words=words)
    assert not (tmp_path / "run" / "tokens" / "meta.json").exists()


def test_unknown_key_and_wrong_type():
    refused("train", "demo", "train.update=3", words=["train.update", "train.updates"], code=2)
    refused("train", "demo", "train.updates=lots", words=["train.updates", "lots", "int"], code=2)


def test_wrong_dictionary_for_a_model(copy, tmp_path):
    run, settings = copy
    other = write_text(tmp_path / "other", train_lines=300, seed=9, words=70)
    settings = [word for word in settings if not word.startswith(("data.text_dir", "run_dir"))]
    settings += [f"data.text_dir={other}", f"run_dir={tmp_path / 'second'}"]
    checkpoint = next((run / "checkpoints").glob("step-*"))
    distlm("data", "prepare", "demo", *settings)
    refused("datastore", "write", "demo", *settings, f"datastore.checkpoint={checkpoint}", words=["dictionary"])


def test_datastore_of_another_model(copy):
    run, settings = copy
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "configs")
    distlm("train", "demo", *settings, "train.seed=2")
    shutil.rmtree(run / "neighbours")
    refused("knn", "search", "demo", *settings, "train.seed=2", words=["datastore", "another model"])


def test_unfinished_datastore(copy):
    run, settings = copy
    alter(run / "datastore/manifest.json", complete=False)
    shutil.rmtree(run / "index")
    refused("index", "build", "demo", *settings, words=["datastore", "unfinished", "datastore write"])


def test_truncated_shard(copy):
    run, settings = copy
    shard = run / "datastore/keys-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    shutil.rmtree(run / "index")
    refused("index", "build", "demo", *settings, words=["keys-00001.npy"])


def test_a_flipped_byte_is_found_by_verify(copy):
    run, settings = copy
    assert distlm("datastore", "verify", "demo", *settings).returncode == 0
    shard = run / "datastore/keys-00001.npy"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    done = distlm("datastore", "verify", "demo", *settings, check=False)
    assert done.returncode == 1 and "keys-00001.npy" in done.stderr


def test_index_of_another_store(copy):
    run, settings = copy
    (path,) = (run / "index").glob("*/index.json")
    alter(path, datastore="0" * 32)
    shutil.rmtree(run / "neighbours")
    refused("knn", "search", "demo", *settings, words=["index", "store"])


def test_not_enough_disk_with_a_pretended_disk_size(copy, tmp_path):
    """The disk is a stand-in that says 1 kB is free: a real one cannot be filled here."""
    run, settings = copy
    script = tmp_path / "small_disk.py"
    script.write_text(
        "import collections, shutil, sys\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(10**6, 10**6 - 1000, 1000)\n"
        "from distlm.cli import main\nmain(sys.argv[1:])\n", "utf-8",
    )  # fmt: skip
    shutil.rmtree(run / "datastore")
    done = mpirun(1, [script, "datastore", "write", "demo", *settings], check=False)
    assert done.returncode == 1 and "free" in done.stderr and "needs" in done.stderr, done.stderr
    assert not list((run / "datastore").glob("keys-*"))


def test_world_mismatch():
    done = mpirun(
        1, ["-m", "distlm", "doctor"], check=False, RANK="0", WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1",
        OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="4",
    )  # fmt: skip
    assert done.returncode == 1
    assert "torch says rank 0 of 2, mpi says rank 1 of 4" in done.stderr
