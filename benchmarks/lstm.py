"""The AWD-LSTM's training step: distlm's against the same model written the usual way.

Both have the paper's model and dropouts, cross-entropy + AR + TAR, clipping and SGD, and are given the same random
words in chunks of `--bptt` tokens. The usual way is what ports of the authors' code do: an nn.LSTM per layer whose
weight_hh_l0 is replaced by a dropped tensor in every forward, a masked copy of the embedding matrix,
nn.Linear over all tokens at once and F.cross_entropy. distlm's is StreamModule with NTASGD, without DeepSpeed,
so that only the models are compared.

The two take turns, --repeat times each; the figures are tokens per second of the best turn, the ratio of processor
seconds (usual / distlm, for a CPU that others use too) and peak memory.

    python benchmarks/lstm.py [--vocabulary 33278] [--batch 20 80] [--steps 3] [--repeat 3] [--out FILE.json]
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from shared.clock import Best, clock, own_peak
from shared.command import Benchmark, Options, report, use_threads
from shared.plain_lstm import PlainLstm, UsualLstm
from torch import Tensor, nn

from distlm.models.awd_lstm.config import LstmConfig
from distlm.models.awd_lstm.lstm import State
from distlm.models.awd_lstm.model import FIRST_ID, AwdLstm
from distlm.models.awd_lstm.nt_asgd import NTASGD
from distlm.models.awd_lstm.objective import StreamModule

AR, TAR, CLIP, RATE, DECAY = 2.0, 1.0, 0.25, 30.0, 1.2e-6


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, vocabulary=500, width=16, hidden_width=24, batch=[4], bptt=10, steps=2, repeat=1)
    parser.add_argument("--vocabulary", type=int, default=33278)
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--hidden-width", type=int, default=1150)
    parser.add_argument("--batch", type=int, nargs="+", default=[20, 80])
    parser.add_argument("--bptt", type=int, default=70)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_threads()
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    torch.set_num_threads(use_threads(options.threads))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LstmConfig(width=options.width, hidden_width=options.hidden_width)
    results = [compare(config, options, batch, device) for batch in options.batch]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    figures = {
        "device": name, "torch": torch.__version__, "vocabulary": options.vocabulary, "bptt": options.bptt,
        "width": options.width, "hidden_width": options.hidden_width, "results": results,
        "peak_resident_bytes": own_peak(),
    }  # fmt: skip
    report(figures, options)


def compare(config: LstmConfig, options: Options, batch: int, device: torch.device) -> dict[str, float]:
    """Tokens per second of both ways at one batch size, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.bptt + 1, batch)
    text = torch.randint(FIRST_ID, options.vocabulary + FIRST_ID, shape, generator=generator).to(device)
    torch.manual_seed(1)
    ours = AwdLstm(config, options.vocabulary + FIRST_ID).to(device)
    usual = UsualLstm(config, options.vocabulary).to(device)
    ways = {"distlm": distlm_step(ours, repeat(text)), "usual": plain_step(usual, repeat(text))}
    best = Best()
    memory = dict.fromkeys(ways, 0)
    for step in ways.values():
        step()
    for _ in range(options.repeat):
        for name, step in ways.items():
            start = clock(device.type)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(options.steps):
                step()
            best.keep(name, clock(device.type) - start, options.steps)
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated()
    rates = {name: options.bptt * batch / seconds for name, seconds in best.wall.items()}
    return {
        "batch": batch,
        **{f"{name}_tokens_per_s": round(rate, 1) for name, rate in rates.items()},
        **{f"{name}_peak_device_bytes": value for name, value in memory.items() if value},
        "ratio": round(rates["distlm"] / rates["usual"], 3),
        "ratio_of_processor_seconds": round(best.processor["usual"] / best.processor["distlm"], 3),
    }


def distlm_step(model: AwdLstm, chunks: Iterator[Tensor]) -> Callable[[], None]:
    """A training step with the next of `chunks`, ids int64 [T + 1, B]."""
    module = StreamModule(model, AR, TAR).train()
    optimizer = NTASGD(module.parameters(), RATE, DECAY)
    states: list[list[State]] = []

    def step() -> None:
        text = next(chunks)
        before = states.pop() if states else model.zero_states(text.shape[1])
        optimizer.zero_grad()
        sums, after = module(text[:-1], text[1:], before)
        module.loss(sums, len(text) - 1, text.shape[1], 1.0).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        states.append(after)

    return step


def plain_step(model: PlainLstm, chunks: Iterator[Tensor]) -> Callable[[], None]:
    """The same with a model in plain torch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, weight_decay=DECAY)
    states: list[list[State]] = []

    def step() -> None:
        ids = next(chunks) - FIRST_ID
        before = states.pop() if states else model.zero_states(ids.shape[1])
        optimizer.zero_grad()
        scores, raw, dropped, after = model(ids[:-1], before)
        loss = F.cross_entropy(scores, ids[1:].flatten())
        loss = loss + AR * dropped.pow(2).mean() + TAR * (raw[1:] - raw[:-1]).pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        states.append(after)

    return step


if __name__ == "__main__":
    main()
