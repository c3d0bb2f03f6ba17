"""Whatever stands where a path is expected: one line, no waiting for ever, and nothing of others is replaced."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import command, has_manners, inside, times
from support.fuzz.paths import THINGS, WORDS, made
from support.fuzz.runs import Base, bases, ready_for

import distlm
from distlm.errors import DistlmError

Factory = pytest.TempPathFactory
SETTINGS = {
    "name": ("data prepare", "report"), "run_dir": ("data prepare", "report", "knn tune"),
    "data.text_dir": ("data prepare",), "data.tokens_dir": ("data prepare", "train", "knn search"),
    "data.dictionary": ("data prepare",), "data.tokenizer": ("data prepare",), "train.init_from": ("train",),
    "train.deepspeed": ("train",), "datastore.folder": ("datastore write", "index build", "knn search"),
    "datastore.checkpoint": ("datastore write", "evaluate"), "index.folder": ("index build", "knn search"),
    "index.name": ("index build", "index info"), "knn.folder": ("knn search", "knn tune"),
    "knn.extra_runs": ("knn tune",),
}  # fmt: skip
"""Setting that is a path or becomes one → stages that open it."""
COMMANDS = (
    "verify {}", "report {}", "metrics {}", "metrics {} --csv", "config {}", "clean {} search --dry-run",
    "clean {} train", "report frequency {}", "datastore info {}", "index info {}", "export hf RECIPE --out {}",
    "index merge --parts {} --out out.index", "index merge --parts merged.index --out {}",
    "index search RECIPE --queries {} --out o.npz", "index search RECIPE --queries q.npy --out {}",
    "index extend --index {} --keys q.npy --out o.index", "index extend --index merged.index --keys {} --out o.index",
    "index extend --index merged.index --keys q.npy --out {}", "index drop --index {} --ids 0:5 --out o.index",
    "index drop --index merged.index --ids 0:5 --out {}", "datastore import-memmap RECIPE --prefix {}",
    "datastore export-memmap RECIPE --prefix {}", "plan RECIPE --rates {}",
    "report words RECIPE --before lm --after knn --out {}", "report words RECIPE --before {}",
    "generate RECIPE --lm-only --tokens 1 --html {}", "import fairseq RECIPE --weights {} --dictionary file",
    "import fairseq RECIPE --weights file --dictionary {}",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: Factory) -> Base:
    return bases(tmp_path_factory)["transformer"]()


def tried(data: st.DataObject, base: Base, folder: Path) -> None:
    """A path in one of its places."""
    place = folder / "here"
    shutil.rmtree(folder, ignore_errors=True)
    made(place)
    word = data.draw(st.sampled_from([*WORDS, *THINGS, *(str(place / thing) for thing in THINGS)]))
    before = _of_others(place)
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(list(SETTINGS)))
        verb = data.draw(st.sampled_from(SETTINGS[key]))
        run = ready_for(verb, base, folder / "run")
        with inside(place):
            # Of two equal settings the later one counts.
            done = command(*verb.split(), base.recipe, f"run_dir={run}", f"{key}={word}")
    else:
        template = data.draw(st.sampled_from(COMMANDS))
        run = ready_for("report", base, folder / "run")
        np.save(place / "q.npy", np.zeros((2, 32), np.float32))
        (index,) = run.glob("index/*/merged.index")
        shutil.copy(index, place / "merged.index")
        shutil.copy(f"{index.parent}/index.json", place)
        before = _of_others(place)
        with inside(place):
            recipe = [str(base.recipe), f"run_dir={run}", "train.updates=1"]
            words = [new for each in template.split() for new in (recipe if each == "RECIPE" else [each.format(word)])]
            done = command(*words)
    has_manners(done)
    assert _of_others(place) == before, done


def _of_others(place: Path) -> dict[str, object]:
    """What lies there and is nobody's to replace; a link that leads nowhere may become a file."""
    paths = {name: place / name for name in THINGS if name not in ("empty", "closed", "dangling", "loop")}
    return {name: (path.lstat().st_mode, path.read_bytes() if path.is_file() else None) for name, path in paths.items()}


@pytest.mark.parametrize("word", [*WORDS, *THINGS])
def test_open_run_and_verify(word: str, tmp_path: Path) -> None:
    made(tmp_path)
    with inside(tmp_path):
        has_manners(command("verify", word))
        try:
            distlm.open_run(word)
        except DistlmError as error:
            assert "\n" not in str(error).replace(word, "")


@times(12)
@given(data=st.data())
def test_paths(data: st.DataObject, base: Base, tmp_path_factory: Factory) -> None:
    tried(data, base, tmp_path_factory.getbasetemp() / "fuzz-paths")


@pytest.mark.slow
@times(300)
@given(data=st.data())
def test_paths_at_length(data: st.DataObject, base: Base, tmp_path_factory: Factory) -> None:
    tried(data, base, tmp_path_factory.getbasetemp() / "fuzz-paths")
