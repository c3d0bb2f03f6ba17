"""The neural cache: distlm's batched evaluation against the per-token loop of the reference method, in one process.

The loop is written from Grave et al. (2016) as Merity et al. evaluate it: a history of one-hot words [window, V] and of
hidden states, and for every token one softmax over θ H h, one product of it with the one-hot history, one mixture with
the model's probability. It is given its cheapest form (one matrix-vector product, the model's probability of the target
alone instead of the whole distribution), fp32 and the same threads. Both end with the perplexity of the same tokens.

    python benchmarks/cache.py --run-dir runs/wikitext2-small [--split valid] [--out FILE.json]
    python benchmarks/cache.py --tokens 20000 --width 400 --vocabulary 33278 [--out FILE.json]

With --run-dir: a run after `distlm knn cache`. Otherwise random states of words by Zipf's law. Both evaluate the first
window + 1 tokens (the model alone) and --sample tokens that have a cache; rates are of the latter. distlm is timed
again on the whole text, with one θ and with the default grid of θ.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from shared.command import Benchmark, Options, note, report, use_threads

from distlm.config import load_config
from distlm.knnlm.cache.scores import add_cache, block_bytes, cache_log_probs
from distlm.knnlm.scoring import mean_loss
from distlm.knnlm.search.states import States
from distlm.runtime.rundir import RunDir

CHUNK = 256
"""Tokens whose one-hot rows the loop adds at once."""


@dataclass(frozen=True)
class Case:
    """What both are given: states fp32 [n, D], words int64 [n], log p of the model fp64 [n]."""

    states: torch.Tensor
    words: torch.Tensor
    log_probs: np.ndarray
    vocabulary: int
    about: dict[str, object]


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, tokens=800, width=16, vocabulary=300, window=128, sample=32)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--split", default="valid")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--vocabulary", type=int, default=33_278)
    parser.add_argument("--window", type=int, default=3785)
    parser.add_argument("--theta", type=float, default=0.662)
    parser.add_argument("--weight", type=float, default=0.1279, help="λ")
    parser.add_argument("--sample", type=int, default=512, help="tokens with a cache that both evaluate")
    parser.add_threads()
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    torch.set_num_threads(use_threads(options.threads))
    report(measure(from_run(options) if options.run_dir else synthetic(options), options), options)


def measure(case: Case, options: Options) -> dict[str, object]:
    """Tokens per second and perplexity of both, on the same tokens."""
    window, theta, weight = options.window, options.theta, options.weight
    tokens = min(len(case.words), window + 1 + options.sample)
    sample = tokens - window - 1
    if sample < 1:
        raise SystemExit(f"--window {window}: the text has {len(case.words)} tokens, none with a full cache")
    note(f"loop over {sample} tokens with a cache")
    loop_loss, loop_seconds = loop(case, tokens, window, theta, weight)
    note("distlm, the same tokens")
    few = [batched(case, tokens, window, [theta], weight) for _ in range(3)]
    loss, seconds = few[0][0], min(spent for _, spent in few)
    note("distlm, all tokens")
    whole = len(case.words)
    _, all_seconds = batched(case, whole, window, [theta], weight)
    thetas = load_config("demo").cache.thetas
    _, grid_seconds = batched(case, whole, window, thetas, weight)
    cached = whole - window - 1
    perplexity, loop_perplexity = math.exp(loss), math.exp(loop_loss)
    return {
        **case.about, "window": window, "theta": theta, "lambda": weight, "threads": torch.get_num_threads(),
        "tokens": tokens, "tokens_with_cache": sample,
        "perplexity": {"loop": loop_perplexity, "distlm": perplexity, "difference": abs(perplexity - loop_perplexity)},
        "tokens_per_s": {
            "loop": round(sample / loop_seconds, 2), "distlm": round(sample / seconds, 1),
            "distlm, whole text": round(cached / all_seconds, 1),
            f"distlm, whole text, {len(thetas)} θ": round(cached / grid_seconds, 1),
        },
        "memory_bytes": {
            "loop": 4 * (window + CHUNK) * (case.vocabulary + case.states.shape[1]),
            "distlm": torch.get_num_threads() * block_bytes(window),
        },
        "ratio": round(loop_seconds / seconds, 1),
    }  # fmt: skip


def loop(case: Case, tokens: int, window: int, theta: float, weight: float) -> tuple[float, float]:
    """Nats per token, and seconds of the tokens that have a cache."""
    states, words = case.states, case.words
    log_probs = list(case.log_probs[: window + 1])
    first = window + 1
    start = time.perf_counter()
    one_hot = torch.zeros(window, case.vocabulary)
    one_hot[torch.arange(window), words[first - window : first]] = 1
    for begin in range(first, tokens, CHUNK):
        chunk = words[begin : min(begin + CHUNK, tokens)]
        added = torch.zeros(len(chunk), case.vocabulary)
        added[torch.arange(len(chunk)), chunk] = 1
        history = torch.cat([one_hot, added])
        for place, word in enumerate(chunk.tolist()):
            t = begin + place
            attention = torch.softmax(theta * (states[t - window : t] @ states[t]), dim=0)
            pointer = attention @ history[place : place + window]
            p = (1 - weight) * math.exp(case.log_probs[t]) + weight * float(pointer[word])
            log_probs.append(math.log(p))
        one_hot = history[len(chunk) :]
    return -math.fsum(log_probs) / tokens, time.perf_counter() - start


def batched(case: Case, tokens: int, window: int, thetas: list[float], weight: float) -> tuple[float, float]:
    """The same by distlm: the code of `distlm knn cache` and `tune`, without its files; nats for the first θ."""
    start = time.perf_counter()
    scores = cache_log_probs(case.states[:tokens], case.words[:tokens], 0, 0, [window], thetas)
    loss = mean_loss(add_cache(case.log_probs[:tokens], scores[0, 0], weight))
    return loss, time.perf_counter() - start


def from_run(options: Options) -> Case:
    """States, words and probabilities of a run's split."""
    run = RunDir(options.run_dir)
    folder = run.neighbours(options.split)
    states = States.open(folder if (folder / "manifest.json").is_file() else run.states(options.split))
    queries = torch.from_numpy(states.rows("queries", 0, states.tokens).astype(np.float32))
    words = torch.from_numpy(states.targets().astype(np.int64))
    about = {"source": f"{run.root.name}, {options.split}", "width": queries.shape[1], "vocabulary": options.vocabulary}
    return Case(queries, words, states.log_probs(), max(options.vocabulary, int(words.max()) + 1), about)


def synthetic(options: Options) -> Case:
    """Words by Zipf's law; states in [−1, 1] as an LSTM's, near each other for equal words."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, options.vocabulary + 1)
    words = random.choice(options.vocabulary, options.tokens, p=weights / weights.sum())
    centres = random.standard_normal((options.vocabulary, options.width), np.float32)
    states = np.tanh(0.15 * centres[words] + 0.15 * random.standard_normal((options.tokens, options.width), np.float32))
    log_probs = np.log(random.beta(1, 30, options.tokens) + 1e-5)
    about = {"source": "synthetic", "width": options.width, "vocabulary": options.vocabulary}
    return Case(torch.from_numpy(states), torch.from_numpy(words), log_probs, options.vocabulary, about)


if __name__ == "__main__":
    main()
