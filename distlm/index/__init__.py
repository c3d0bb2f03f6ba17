"""The faiss index: template, parts, merge, search. The only room that imports faiss."""

from distlm.index.add import run_index_add
from distlm.index.build import index_info, run_index_build
from distlm.index.merge import run_index_merge
from distlm.index.plan import plan_index
from distlm.index.search import SearchIndex, brute_search, exact_distances, open_index
from distlm.index.template import run_index_train

__all__ = [
    "SearchIndex",
    "brute_search",
    "exact_distances",
    "index_info",
    "open_index",
    "plan_index",
    "run_index_add",
    "run_index_build",
    "run_index_merge",
    "run_index_train",
]
