"""The faiss index: template, parts, merge, search. The only room that imports faiss."""

from distlm.index.build.add import run_index_add
from distlm.index.build.stage import index_info, run_index_build
from distlm.index.build.template import run_index_train
from distlm.index.choose.plan import plan_index
from distlm.index.merge.stage import run_index_merge
from distlm.index.search.searcher import SearchIndex, brute_search, exact_distances, open_index

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
