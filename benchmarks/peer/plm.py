"""A masked model's training step, as `plm.py` measures it: `distlm train`, and loops of transformers on the same masks.

The first weights are drawn apart, so perplexities agree up to that.
"""

from collections.abc import Iterator

from plm import RECIPE, WAYS, parser, plain, settings
from shared.run import distlm, training_figures

from peer.turn import OURS, Place, Side, Turn

PEERS = {"transformers (head on predicted tokens)": WAYS[2], "transformers": WAYS[1]}
REAL = ["--updates", "12", "--first", "4"]


def turns(place: Place) -> Iterator[Turn]:
    """A training of each in every turn."""
    sizes = ["--quick"] if place.quick else REAL
    options = parser().options([*sizes, "--text", str(place.text), "--threads", str(place.threads)])
    distlm(["data", "shard", RECIPE, *settings(place.folder / "prepare", options)])
    tokens = options.rows * options.row_tokens
    size = (
        f"recipe {RECIPE} without memory, {options.vocabulary:,} word pieces, {options.rows} rows of "
        f"{options.row_tokens} tokens an update; {options.updates - options.first} updates a turn"
    )
    for number in range(place.turns):
        folder = place.folder / f"turn-{number}"
        distlm(["train", RECIPE, *settings(folder, options)])
        found = {OURS: training_figures(folder)}
        found |= {name: plain(way, folder, options) for name, way in PEERS.items()}
        sides = {name: Side(tokens / one["seconds_per_update"], one["perplexity"]) for name, one in found.items()}
        yield Turn(size, sides)
