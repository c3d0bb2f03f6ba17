"""What `import distlm` gives: these names, no torch, and docstrings that say shapes and errors."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ENVIRONMENT
from support.deadline import DEADLINE_S

import distlm

PUBLIC = {
    "Datastore", "DistlmError", "KnnLM", "KnnLogitsProcessor", "ProductKeyMemory", "Run", "SparseValueOptimizer",
    "__version__", "open_run", "write_datastore",
}  # fmt: skip
NO_ARRAYS = {"DistlmError", "open_run"}
"""Names that neither take nor give arrays."""
CALLED = ("__init__", "__call__", "__getitem__")
"""Methods that are called without their names."""
NAMES = sorted({*distlm.__all__} - {"__version__"})
SHAPE = re.compile(r"\[(?:…|\.\.\.|[A-Z])[^\]]*\]")


def documented(name: str) -> Iterator[tuple[str, object]]:
    """A public name, and the methods and properties that its class defines itself."""
    found = getattr(distlm, name)
    yield name, found
    if inspect.isclass(found):
        for own, member in vars(found).items():
            member = getattr(member, "__func__", member)
            if (own in CALLED or not own.startswith("_")) and (callable(member) or isinstance(member, property)):
                yield f"{name}.{own}", member


def test_the_names_are_these() -> None:
    assert {*distlm.__all__} == PUBLIC
    assert distlm.__all__ == sorted(distlm.__all__) and dir(distlm) == distlm.__all__
    with pytest.raises(AttributeError, match="has no attribute 'open_runs'"):
        _ = distlm.open_runs


def test_types_places_and_names_agree() -> None:
    assert [*distlm._PLACES] == [name for name in distlm.__all__ if name != "__version__"]
    tree = ast.parse(Path(distlm.__file__).read_text("utf-8"))
    typed = {
        alias.name: node.module
        for guard in tree.body if isinstance(guard, ast.If)
        for node in guard.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert typed == distlm._PLACES


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_say_shapes_and_errors(name: str) -> None:
    texts = {own: inspect.getdoc(found) or "" for own, found in documented(name)}
    assert not [own for own, text in texts.items() if not text.strip()]
    whole = "\n".join(texts.values())
    assert name in NO_ARRAYS or SHAPE.search(whole), "no shape"
    assert name == "DistlmError" or re.search(r"\b[Rr]aise[sd]?\b", whole), "no error"


def test_importing_loads_nothing_that_computes() -> None:
    code = (
        "import sys, distlm\n"
        "for name in ('DistlmError', 'Datastore', 'Run', 'open_run', 'write_datastore'):\n"
        "    getattr(distlm, name).__doc__\n"
        "print([name for name in ('torch', 'faiss', 'transformers', 'deepspeed', 'mpi4py') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S
    )  # fmt: skip
    assert done.stdout == "[]\n", done.stdout + done.stderr
