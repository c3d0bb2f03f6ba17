"""distlm: train and serve memory-augmented language models over many nodes.

The public names are imported when they are first used: `import distlm` itself loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distlm.api.run import Run as Run
    from distlm.api.run import open_run as open_run
    from distlm.datastore.exchange.arrays import write_datastore as write_datastore
    from distlm.datastore.reader import Datastore as Datastore
    from distlm.errors import DistlmError as DistlmError
    from distlm.integrations.knn_lm import KnnLM as KnnLM
    from distlm.integrations.processor import KnnLogitsProcessor as KnnLogitsProcessor
    from distlm.memory.layer import ProductKeyMemory as ProductKeyMemory
    from distlm.memory.values.optimizer import SparseValueOptimizer as SparseValueOptimizer

__version__ = "0.2.0"

_PLACES = {
    "Datastore": "distlm.datastore.reader",
    "DistlmError": "distlm.errors",
    "KnnLM": "distlm.integrations.knn_lm",
    "KnnLogitsProcessor": "distlm.integrations.processor",
    "ProductKeyMemory": "distlm.memory.layer",
    "Run": "distlm.api.run",
    "SparseValueOptimizer": "distlm.memory.values.optimizer",
    "open_run": "distlm.api.run",
    "write_datastore": "distlm.datastore.exchange.arrays",
}
"""Public name → the module that has it."""

__all__ = [
    "Datastore",
    "DistlmError",
    "KnnLM",
    "KnnLogitsProcessor",
    "ProductKeyMemory",
    "Run",
    "SparseValueOptimizer",
    "__version__",
    "open_run",
    "write_datastore",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'distlm' has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
