"""Plans before work, light imports, and the error where faiss is missing or doubled."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ENVIRONMENT
from support.deadline import DEADLINE_S
from support.index import config, one_rank, vectors, write_store

from distlm.errors import DistlmError, UsageError
from distlm.index import faiss_module, plan_index, run_index_build
from distlm.index.faiss_module import require_faiss


def test_importing_the_room_loads_no_torch() -> None:
    code = "import sys, distlm.index; assert 'torch' not in sys.modules and 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=DEADLINE_S)


@pytest.mark.parametrize(
    ("factory", "key_bytes"),
    [("PCA16,IVF64,PQ8x4", 12), ("IVF128,SQ8", 40), ("IVF64,PQ4", 12), ("RR32,IVF64,Flat", 136)],
)
def test_plan_agrees_with_what_is_written(tmp_path: Path, factory: str, key_bytes: int) -> None:
    write_store(tmp_path / "datastore", vectors(6000))
    settings = config(tmp_path, factory=factory)
    plan = plan_index(settings, 2)
    with one_rank(settings) as stage:
        run_index_build(stage)
    written = sum(path.stat().st_size for path in (tmp_path / "index").rglob("*.index"))
    assert plan.disk_bytes == pytest.approx(written, rel=0.05)
    assert plan.seconds is not None and 0 < plan.seconds < 60
    assert f"6000 keys × 32 → {factory}, {key_bytes} bytes/key, 4 parts" in plan.line()


def test_plan_without_a_store(tmp_path: Path) -> None:
    estimated = plan_index(config(tmp_path), 1)
    assert estimated.disk_bytes > 10_000_000 and "the rows" not in estimated.line()
    hub = config(tmp_path)
    hub.data.source = "hub"
    plan = plan_index(hub, 1)
    assert plan.seconds is None and "distlm data prepare" in plan.line() and "disk unknown" in plan.line()
    hub.index.factory = "IVFF64,PQ8"
    with pytest.raises(UsageError, match="IVFF64,PQ8"):
        plan_index(hub, 1)


@pytest.fixture
def unloaded() -> Iterator[None]:
    """require_faiss as in a new process."""
    require_faiss.cache_clear()
    yield
    require_faiss.cache_clear()


@pytest.mark.usefixtures("unloaded")
def test_missing_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DistlmError, match=r"pip install .*\[cpu\]'"):
        require_faiss()


@pytest.mark.usefixtures("unloaded")
def test_two_faiss_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_module, "_installed", lambda name: name in ("faiss-cpu", "faiss-gpu"))
    with pytest.raises(DistlmError, match="pip uninstall -y faiss-cpu faiss-gpu"):
        require_faiss()
