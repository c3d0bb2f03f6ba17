"""The block plan: which tokens are context and which are scored, a pure function of corpus, window and block size.

No state is carried from block to block, so any rank can compute any block.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distlm.data.dictionary import Dictionary
from distlm.errors import DistlmError, UsageError

Ints = npt.NDArray[np.int64]
BEGINS = ", after the beginning-of-text token"
"""What a context rule in words adds where each block has that token in front."""


@dataclass(frozen=True)
class Blocks:
    """n blocks of a token stream. Block i scores the tokens [start, end) and sees the tokens from context_start on."""

    context_start: Ints
    """int64 [n]."""
    start: Ints
    """int64 [n]."""
    end: Ints
    """int64 [n]."""

    def __len__(self) -> int:
        return len(self.start)

    @property
    def scored(self) -> Ints:
        """Scored tokens of each block: int64 [n]."""
        return self.end - self.start

    @property
    def lengths(self) -> Ints:
        """Context and scored tokens of each block: int64 [n]."""
        return self.end - self.context_start


@dataclass(frozen=True)
class Batch:
    """Rows left-aligned, padded on the right to the longest one."""

    inputs: Ints
    """int64 [B, T]: the tokens before the targets."""
    targets: Ints
    """int64 [B, T]."""
    scored: npt.NDArray[np.bool_]
    """bool [B, T]: positions whose target is in [start, end) of the row's block; never padding."""


def require_fit(context_window: int, block: int, longest: int, section: str = "") -> None:
    """UsageError for blocks of `block` tokens and their context that are longer than the `longest` tokens that a model
    takes, with a length that fits; `section`: what is before the names of the two settings."""
    if context_window + block <= longest:
        return
    if block <= longest:
        mend = f"{section}context_window={longest - block} or less"
    elif context_window < longest:
        mend = f"{section}block={longest - context_window} or less"
    else:
        mend = f"{section}context_window={longest // 2} and {section}block={longest - longest // 2}, or less"
    raise UsageError(
        f"{section}context_window={context_window} + {section}block={block} exceeds the model's "
        f"max_positions={longest}; choose {mend}"
    )


def training_blocks(tokens: int, length: int) -> Blocks:
    """Fixed chunks of `length` tokens without context, all scored; the short last one is kept.

    This is fairseq's `--sample-break-mode none`. Raises DistlmError when length < 1 or there are no tokens.
    """
    _at_least("length of a training block (train.tokens_per_sample)", length, 1)
    _at_least("tokens to train on", tokens, 1)
    start = np.arange(0, tokens, length, dtype=np.int64)
    return Blocks(start, start, np.minimum(start + length, tokens))


def store_blocks(tokens: int, context_window: int, block: int) -> Blocks:
    """Blocks of `block` tokens, each with the `context_window` tokens before it as context.

    The first `context_window` tokens are not scored (min-context rule), the short last block is kept: rows
    N = tokens − context_window. WikiText-103 with 1536 and 1536: N = 103,225,485 in 67,205 blocks, the last of 141
    (fairseq counts 67,206 with the first one, which it drops).
    Raises DistlmError when no token is left to score, or for a negative window or an empty block.
    """
    _at_least("context_window", context_window, 0)
    _at_least("block", block, 1)
    if tokens <= context_window:
        raise DistlmError(
            f"context_window={context_window} leaves nothing to store of a split with {tokens} tokens; "
            f"choose a smaller datastore.context_window"
        )
    start = np.arange(context_window, tokens, block, dtype=np.int64)
    return Blocks(start - context_window, start, np.minimum(start + block, tokens))


def eval_blocks(ids: npt.NDArray[np.integer], context_window: int, block: int) -> Blocks:
    """Whole lines packed greedily into blocks of at most `block` tokens, with up to `context_window` tokens before.

    `ids` int [tokens], a line ends with EOS. A line longer than `block` starts a new block and is cut in pieces of
    `block` tokens; its last piece is packed with the lines after it. Every token is scored once; the first blocks
    have less context. This is fairseq's `--sample-break-mode complete --context-window`, where `block` is its
    max tokens − context window. Raises DistlmError for a negative window, an empty block or no tokens.
    """
    _at_least("context_window", context_window, 0)
    _at_least("block", block, 1)
    _at_least("tokens to score", len(ids), 1)
    breaks = _pieces(_line_ends(ids), block)
    # One search per block: the last break that is at most `block` tokens after the block's start.
    edges, at = [0], 0
    while at < len(breaks):
        at = int(np.searchsorted(breaks, edges[-1] + block, side="right"))
        edges.append(int(breaks[at - 1]))
    bounds = np.array(edges, dtype=np.int64)
    return Blocks(np.maximum(bounds[:-1] - context_window, 0), bounds[:-1], bounds[1:])


def gather(
    ids: npt.NDArray[np.integer],
    blocks: Blocks,
    indices: npt.ArrayLike,
    pad: int = Dictionary.PAD,
    begins: bool = False,
    least: int = 0,
    vocabulary: int = 0,
) -> Batch:
    """The batch of some blocks, as NumPy arrays; T is the longest of these rows, or `least` where that is more.

    `ids` int [tokens] (a memory map is fine), `indices` int [B]. The input of position t is token t−1, and EOS before
    token 0. With `begins` the first input of each row is BOS instead: a block's text then begins as a text does for
    models that were trained so, at the cost of the one token before its context; no position is added and none scored.
    Padding: `pad` in inputs and targets, False in scored. With `vocabulary` DistlmError for an id that is none.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    context_start, start, end = blocks.context_start[chosen], blocks.start[chosen], blocks.end[chosen]
    rows, longest = len(chosen), int((end - context_start).max(initial=least))
    inputs = np.full((rows, longest), pad, dtype=np.int64)
    targets = np.full((rows, longest), pad, dtype=np.int64)
    for row, (first, last) in enumerate(zip(context_start.tolist(), end.tolist(), strict=True)):
        length = last - first
        targets[row, :length] = ids[first:last]
        if vocabulary:
            require_ids(targets[row, :length], vocabulary, first)
        inputs[row, 0] = Dictionary.BOS if begins else ids[first - 1] if first > 0 else Dictionary.EOS
        inputs[row, 1:length] = targets[row, : length - 1]
    position = context_start[:, None] + np.arange(longest)
    return Batch(inputs, targets, (position >= start[:, None]) & (position < end[:, None]))


def require_ids(ids: npt.NDArray[np.integer], vocabulary: int, first: int = 0) -> None:
    """DistlmError for an id outside 0 … V − 1, naming the token; `first`: number of the first one in its split."""
    if len(wrong := np.flatnonzero((ids < 0) | (ids >= vocabulary))):
        raise DistlmError(
            f"token {first + int(wrong[0])} has the id {int(ids[wrong[0]])}, the dictionary has 0 to {vocabulary - 1}: "
            "the token files are damaged, or of another dictionary; run `distlm verify` on them, and prepare them anew"
        )


def _line_ends(ids: npt.NDArray[np.integer]) -> Ints:
    """Offsets just after each EOS, and the end of the stream: int64 [lines]."""
    ends = np.flatnonzero(np.asarray(ids) == Dictionary.EOS).astype(np.int64) + 1
    if len(ends) == 0 or ends[-1] != len(ids):
        ends = np.append(ends, len(ids))
    return ends


def _pieces(ends: Ints, block: int) -> Ints:
    """Line ends with the cuts of lines longer than `block` put in, ascending."""
    starts = np.concatenate(([0], ends[:-1]))
    cuts = [np.arange(starts[i] + block, ends[i], block) for i in np.flatnonzero(ends - starts > block)]
    return np.sort(np.concatenate([ends, *cuts])) if cuts else ends


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise DistlmError(f"{what} is {value}; it must be at least {least}")
