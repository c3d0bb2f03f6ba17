"""Neighbours in Hugging Face's `generate`: what KnnLogitsProcessor adds to a step, against plain `generate`.

A GPT-2 of random weights goes on with random tokens, greedily, with past key values: alone, and with the processor
over a store of random keys. The search alone is timed with the queries of as many steps, and so is the mixture, which
is log_softmax and an addition over [batch, vocabulary] and a pass over [batch, k]. All take turns, --repeat times each;
the figures are milliseconds of the best turn per step, on the wall and of the processor, and ratios (of processor
seconds on a CPU, which others may use too; of the wall's on a GPU):

  with / plain                        a step with the processor, in steps without
  added / search                      what it adds, in searches: 1 were the search and nothing else
  (added − search) / plain            the rest of what it adds, in steps without

    python benchmarks/knn_generate.py [--rows 500000] [--factory IVF1024,PQ64] [--k 1024] [--batch 8] [--out FILE.json]
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from shared.clock import Best, clock
from shared.command import Benchmark, report, use_threads

from distlm import KnnLM, KnnLogitsProcessor
from distlm.datastore.held import PLACE, HeldDatastore
from distlm.datastore.records import Manifest, Shard
from distlm.datastore.settings import Settings
from distlm.index.build.memory import build_in_memory
from distlm.integrations.mixture import Mixing, mixed
from distlm.integrations.retrieve import Retriever


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, layers=2, width=32, heads=2, vocabulary=300, rows=3000, factory="IVF16,PQ4", k=32, batch=2, prompt=8,
        tokens=4, repeat=1,
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--factory", default="IVF1024,PQ64")
    parser.add_argument("--nprobe", type=int, default=32)
    parser.add_argument("--quantised", action="store_true", help="distances as the index gives them, not exact ones")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_threads()
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    torch.set_num_threads(use_threads(options.threads))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)
    model, knn = made(options, device)
    store = random_store(knn, options.rows)
    retriever = Retriever(store, build_in_memory(store, options.factory, 1 << 20, 1), options.nprobe,
                          not options.quantised)  # fmt: skip
    knn.take(retriever, Mixing(0.25, 10.0, options.k))
    given = torch.randint(1, options.vocabulary, (options.batch, options.prompt), device=device)
    best = Best()
    for _ in range(options.repeat + 1):
        turn(model, knn, given, options, best)
    seconds = best.wall if device.type == "cuda" else best.processor
    plain, whole, search, mixture = (seconds[name] for name in ("plain", "with", "search", "mixture"))
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "parameters": sum(one.numel() for one in model.parameters()), "rows": store.rows,
        "factory": options.factory, "nprobe": options.nprobe, "exact": retriever.exact, "k": options.k,
        "batch": options.batch, "vocabulary": options.vocabulary,
        "ms_per_step": {name: 1000 * found for name, found in best.wall.items()},
        "processor_ms_per_step": {name: 1000 * found for name, found in best.processor.items()},
        "ratios": {
            "with / plain": whole / plain, "added / search": (whole - plain) / search,
            "(added - search) / plain": (whole - plain - search) / plain, "mixture / plain": mixture / plain,
        },
    }  # fmt: skip
    report(figures, options)


def made(options: Any, device: torch.device) -> tuple[Any, KnnLM]:
    """A model that is hardly drawn, and a KnnLM round it."""
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel

    pieces = {"</s>": 0, **{f"w{i}": i for i in range(1, options.vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="w1"))
    config = GPT2Config(
        vocab_size=options.vocabulary, n_positions=max(64, 2 * (options.prompt + options.tokens)), n_embd=options.width,
        n_layer=options.layers, n_head=options.heads, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().to(device)
    return model, KnnLM(model, tokenizer)


def random_store(knn: KnnLM, rows: int) -> HeldDatastore:
    """Keys like layer-normed states round a few thousand centres, and random tokens."""
    random, width = np.random.default_rng(1), knn.lm.width
    centres = random.standard_normal((4096, width), np.float32)
    keys = np.empty((rows, width), np.float16)
    for first in range(0, rows, 65536):
        some = keys[first : first + 65536]
        some[:] = centres[random.integers(0, len(centres), len(some))]
        some += 0.3 * random.standard_normal(some.shape, np.float32).astype(np.float16)
    values = random.integers(4, knn.lm.vocabulary, rows, np.int32)
    settings = Settings("train", knn.tap, 0, rows, 1, rows, "float16", width, knn.lm.vocabulary, "", "", "")
    shard = Shard(0, 0, rows, 0, rows, "keys", "values")
    return HeldDatastore(PLACE, Manifest.of_store(settings, rows, [shard], complete=True), [(keys, values)])


def turn(model: Any, knn: KnnLM, given: torch.Tensor, options: Any, best: Best) -> None:
    """Each of the four once."""
    words = {"input_ids": given, "attention_mask": torch.ones_like(given), "max_new_tokens": options.tokens,
             "min_new_tokens": options.tokens, "do_sample": False}  # fmt: skip
    kind = given.device.type
    queries = np.asarray(knn.datastore.keys(0)[: options.batch], np.float32)
    scores = torch.randn(options.batch, options.vocabulary, device=given.device)
    with torch.inference_mode():
        for name in ("plain", "with", "search", "mixture"):
            processors = [KnnLogitsProcessor(knn)] if name == "with" else []
            near = knn.retriever.search(queries, options.k)
            start = clock(kind)
            if name in ("plain", "with"):
                model.generate(**words, logits_processor=processors)
            for _ in range(options.tokens):
                if name == "search":
                    knn.retriever.search(queries, options.k)
                elif name == "mixture":
                    mixed(scores, knn.pieces(near.values), near.shares(10.0), knn.mixing.lambdas(near))
            best.keep(name, clock(kind) - start, options.tokens)


if __name__ == "__main__":
    main()
