"""kNN evaluation: search, distances and p_kNN of tokens, from nothing, as `knn_eval.py` measures it on one index file.

Peers are urvashik/knnlm's method; knn-transformers' with distances of the true keys, which gives the same perplexity;
and that one as it is by default, with the distances that the index has, which reads no key.
"""

from collections.abc import Iterator

import numpy as np
import torch
from knn_eval import WAYS, Bench, by_vocabulary, parser, perplexity, prepare, turn
from rescoring import from_run
from shared.clock import Seconds, clock
from shared.run import SETTINGS, finished_run

from peer.turn import OURS, Place, Side, Turn

THEIRS, EXACT, QUANTISED = "urvashik/knnlm", "knn-transformers (exact distances)", "knn-transformers (no keys)"
RECIPE = "wikitext2-small"
REAL = [
    "data.source=folder", "model.layers=2", "train.updates=5", "train.warmup_updates=2", "train.valid_every=0",
    "train.save_every=0", "index.factory=IVF512,PQ32", "index.sample=32768", "knn.splits=[valid]", "knn.k=1024",
    "knn.nprobe=16", "knn.ks=[1024]", "launch.ranks=1",
]  # fmt: skip
"""Codes of 8 bits, as the peers have them; distlm is faster with 4 bits. What the model has learnt costs no time."""


def turns(place: Place) -> Iterator[Turn]:
    """The run is made once."""
    settings = [*SETTINGS] if place.quick else [*REAL, f"launch.threads={place.threads}"]
    run = finished_run(place.folder, place.text, "demo" if place.quick else RECIPE, settings)
    words = ["--run-dir", str(run), "--queries", "0", "--threads", str(place.threads)]
    options = parser().options([*(["--quick"] if place.quick else []), *words])
    torch.set_num_threads(place.threads)
    bench = prepare(from_run(options), options)
    about = bench.case.about
    size = (
        f"{about['rows']:,} keys of {about['width']} values, {about['factory']}, nprobe {bench.case.nprobe}, "
        f"k {bench.case.k:,}; {len(bench.case.queries):,} tokens (peers: {len(bench.sample):,})"
    )
    for _ in range(place.turns):
        found = turn(bench)
        quantised, spent = with_the_index_distances(bench)
        sides = {}
        for name, way, of in ((OURS, "distlm first", OURS), (THEIRS, WAYS[0], WAYS[0]), (EXACT, WAYS[1], WAYS[1])):
            both, tokens = found.spent[way]
            sides[name] = Side(tokens / float(both[0]), found.perplexity[of])
        sides[QUANTISED] = Side(len(bench.sample) / float(spent[0]), quantised)
        yield Turn(size, sides)


def with_the_index_distances(bench: Bench) -> tuple[float, Seconds]:
    """Perplexity and the clocks of all batches."""
    case, scores = bench.case, []
    start = clock()
    for places in bench.batches:
        distances, ids = bench.plain(case.queries[places])
        distances[ids < 0] = np.inf
        log_weights = torch.log_softmax(-torch.from_numpy(distances), dim=1)
        words = torch.from_numpy(bench.values[np.maximum(ids, 0)])
        targets = torch.from_numpy(case.targets[places])
        scores.append(by_vocabulary(log_weights, words, targets, case.store.vocabulary))
    spent = clock() - start
    return perplexity(bench.log_lm[bench.sample], np.concatenate(scores)), spent
