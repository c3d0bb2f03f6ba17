"""How many neighbours an index is asked for; exact distances then choose k of them."""

from distlm.config.schema import KnnConfig
from distlm.errors import UsageError

MORE = 2
"""Candidates of coarse codes, over k."""
COARSE_BITS = 4
"""Codes with fewer bits for each number of a key lose so many of the true neighbours that more than k should be looked
at."""
MOST_ON_GPU = 2048
"""Neighbours and lists that faiss's kernels take."""


def is_coarse(code_size: int, width: int) -> bool:
    """Whether codes of so many bytes, for keys of `width` values, are coarse (COARSE_BITS)."""
    return 8 * code_size < COARSE_BITS * width


def candidates_of(knn: KnnConfig, rows: int, coarse: bool) -> int:
    """Neighbours that a search for knn.k among `rows` keys asks its index for: knn.candidates, or what its codes need.

    At least knn.k, and no more than there are keys. Only where exact squared L2 chooses among them: by other distances
    the index's order stands.
    """
    chooses = knn.search == "index" and knn.distances == "exact" and knn.similarity == "l2"
    wanted = knn.candidates or knn.k * (MORE if coarse else 1)
    return max(knn.k, min(wanted, rows)) if chooses else knn.k


def refuse_too_many(knn: KnnConfig, candidates: int, nlist: int) -> None:
    """UsageError for a search with knn.scan=gpu that asks for more than a GPU takes: of `candidates` neighbours, of
    which exact distances may choose knn.k, among `nlist` lists."""
    if knn.scan != "gpu" or knn.search != "index":
        return
    for name, value in (("k", knn.k), ("candidates", candidates), ("nprobe", min(knn.nprobe, nlist))):
        if value > MOST_ON_GPU:
            raise UsageError(
                f"knn.{name}={value}: knn.scan=gpu takes at most {MOST_ON_GPU}; set knn.{name}={MOST_ON_GPU} or less, "
                "or knn.scan=queries"
            )
