"""The neural cache: a softmax over the hidden states of the last tokens of the evaluated text itself.

Grave, Joulin and Usunier (2016): p_cache(w) ∝ Σ over the previous `window` tokens i of exp(θ h_t·h_i) [x_i = w], where
h_t is the hidden state that predicts token x_t. Only the target's probability is needed for perplexity, so nothing of
vocabulary size is ever made. A block of R tokens is one product with the window + R − 1 states before its last token;
its band of [R, window] products, shifted row by row, is a view. A mask of the target's earlier places and two masked
logsumexp give the rest.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distlm.knnlm.scoring import Floats, interpolate
from distlm.runtime.ranks.one_thread import one_thread, one_thread_workers

Fill = Literal["full", "partial"]

CELLS = 1 << 20
"""Products h_t·h_i made at once by one thread, about."""
CELL_BYTES = 38
"""Memory of one of them at most: the product, its exponential, the mask, and places and products of the hits (all of
them when the text repeats one word)."""
_FEWEST_ROWS, _MOST_ROWS = 16, 512


def first_cached(window: int, fill: Fill) -> int:
    """The first token (from 0) that has a cache.

    `full` is the rule of Merity et al.'s code, more than `window` tokens must have been seen; `partial` uses what there
    is from the second token on. Tokens before it are predicted by the language model alone.
    """
    return window + 1 if fill == "full" else 1


def rows_of_block(window: int) -> int:
    """Tokens R scored at once; a function of the window only, so that no bit depends on ranks or threads."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS, CELLS // window))


def block_bytes(window: int) -> int:
    """Memory of one block, at most; one block is in work per thread."""
    rows = rows_of_block(window)
    return rows * (window + rows) * CELL_BYTES


@torch.inference_mode()
def cache_log_probs(
    states: Tensor,
    words: Tensor,
    origin: int,
    first: int,
    windows: Sequence[int],
    thetas: Sequence[float],
    fill: Fill = "full",
) -> Floats:
    """log p_cache of the tokens `first`, first + 1, … of a text: fp64 [windows, thetas, q].

    `states` fp32 [n, D] and `words` int64 [n] are the text's tokens origin … origin + n − 1, each with the state that
    predicts it; they must reach back to first − max(windows), or to the text's beginning. `windows` rise, `thetas` are
    above 0. −inf where the target is not in the window; NaN where the token has no cache yet (`first_cached`).
    """
    width, last = windows[-1], origin + len(states)
    if list(windows) != sorted(set(windows)) or windows[0] < 1 or min(thetas) <= 0:
        raise ValueError(f"windows={windows}, thetas={thetas}")
    if origin > max(0, first - width) or not origin <= first < last:
        raise ValueError(f"tokens {origin} to {last} do not hold what token {first} with a window of {width} needs")
    step = rows_of_block(width)

    def block(start: int) -> Floats:
        return _score_block(states, words, origin, start, min(step, last - start), windows, thetas)

    # Tokens that no window has a cache for are not computed. Blocks begin at multiples of R from `first` even so.
    skipped = min(last - first, max(0, first_cached(windows[0], fill) - first)) // step * step
    scores = np.full((len(windows), len(thetas), last - first), np.nan)
    starts = range(first + skipped, last, step)
    for start, part in zip(starts, _in_threads(block, starts), strict=True):
        scores[..., start - first : start - first + part.shape[-1]] = part
    for place, window in enumerate(windows):
        scores[place, :, : max(0, first_cached(window, fill) - first)] = np.nan
    return scores


def add_cache(log_probs: Floats, log_cache: Floats, weight: float) -> Floats:
    """log((1 − λ) p + λ p_cache), fp64 [q]; p itself where there is no cache (NaN), and p bit for bit with weight 0."""
    if weight == 0:
        return log_probs
    absent = np.isnan(log_cache)
    return np.where(absent, log_probs, interpolate(log_probs, np.where(absent, 0.0, log_cache), weight))


def _score_block(
    states: Tensor, words: Tensor, origin: int, start: int, rows: int, windows: Sequence[int], thetas: Sequence[float]
) -> Floats:
    """log p_cache of the tokens start … start + rows − 1, whatever the warm-up rule says: fp64 [windows, thetas, q]."""
    width = windows[-1]
    pad = max(0, width - start)
    history = slice(start - width + pad - origin, start + rows - 1 - origin)
    own = slice(start - origin, start - origin + rows)
    columns = width + rows - 1
    products = torch.full((rows, columns), -torch.inf)
    if columns > pad:
        torch.mm(states[own], states[history].T, out=products[:, pad:])
    # Row r's window is the columns r … r + width − 1: a shifted view, oldest token first.
    band = products.as_strided((rows, width), (columns + 1, 1))
    past = F.pad(words[history], (pad, 0), value=-1).unfold(0, width, 1)
    row, column = (past == words[own, None]).nonzero(as_tuple=True)
    hit = band[row, column].double()

    # Shorter windows are ends of longer ones: each stretch between two window sizes is summed once.
    totals = torch.empty(len(windows), len(thetas), rows, dtype=torch.float64)
    hits = torch.empty_like(totals)
    for place, window in enumerate(windows):
        old, young = width - window, width - (windows[place - 1] if place else 0)
        _stretch(band[:, old:young], thetas, totals[place])
        inside = (column >= old) & (column < young)
        _stretch_hits(row[inside], hit[inside], thetas, hits[place])
    sums = [np.logaddexp.accumulate(part.numpy(), axis=0) for part in (hits, totals)]
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[0] - sums[1])


def _stretch(products: Tensor, thetas: Sequence[float], out: Tensor) -> None:
    """log Σ exp(θ products) of each row into `out` fp64 [thetas, rows]; products fp32 [rows, n], −inf where absent."""
    top = products.amax(dim=1, keepdim=True)
    top.masked_fill_(torch.isneginf(top), 0.0)
    below = products - top
    weights = torch.empty_like(below)
    for place, theta in enumerate(thetas):
        torch.mul(below, theta, out=weights).exp_()
        out[place] = weights.sum(dim=1).double().log_() + theta * top[:, 0].double()


def _stretch_hits(row: Tensor, hit: Tensor, thetas: Sequence[float], out: Tensor) -> None:
    """The same over the hits alone, given as row int64 [n] and product fp64 [n]; relative to each row's nearest hit."""
    rows = out.shape[1]
    best = torch.full((rows,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, row, hit, "amax")
    below = hit - best[row]
    for place, theta in enumerate(thetas):
        out[place] = hit.new_zeros(rows).index_add_(0, row, (theta * below).exp_()).log_() + theta * best


def _in_threads(action: Callable[[int], Floats], items: Sequence[int]) -> Iterator[Floats]:
    """`action` of each item in order, one single-threaded call per torch thread at a time: the same bits for any
    number of threads, which products that threads share do not give."""
    with one_thread() as threads, one_thread_workers(threads, "cache") as pool:
        running: deque[Future[Floats]] = deque()
        for item in items:
            running.append(pool.submit(torch.inference_mode()(action), item))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
