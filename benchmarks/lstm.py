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

import resource
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from shared.clock import Best, clock
from shared.command import Benchmark, Options, report, use_threads
from torch import Tensor, nn

from distlm.models.awd_lstm.config import LstmConfig
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
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
    report(figures, options)


def compare(config: LstmConfig, options: Options, batch: int, device: torch.device) -> dict[str, float]:
    """Tokens per second of both ways at one batch size, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.bptt + 1, batch)
    text = torch.randint(FIRST_ID, options.vocabulary + FIRST_ID, shape, generator=generator).to(device)
    ways = {"distlm": distlm_step(config, options.vocabulary, text), "usual": usual_step(config, options, text)}
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


def distlm_step(config: LstmConfig, vocabulary: int, text: Tensor) -> Callable[[], None]:
    torch.manual_seed(1)
    model = AwdLstm(config, vocabulary + FIRST_ID)
    module = StreamModule(model, AR, TAR).to(text.device).train()
    optimizer = NTASGD(module.parameters(), RATE, DECAY)
    states = [model.zero_states(text.shape[1])]

    def step() -> None:
        optimizer.zero_grad()
        sums, states[0] = module(text[:-1], text[1:], states[0])
        module.loss(sums, len(text) - 1, text.shape[1], 1.0).backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()

    return step


class UsualModel(nn.Module):
    """nn.LSTM layers with a replaced weight, as ports of the authors' code have them."""

    def __init__(self, config: LstmConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        widths = [config.width, *[config.hidden_width] * (config.layers - 1), config.width]
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.layers = [nn.LSTM(before, after) for before, after in pairwise(widths)]
        self.decoder = nn.Linear(config.width, vocabulary)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.raw = nn.ParameterList()
        for number, layer in enumerate(self.layers):
            self.add_module(f"layer_{number}", layer)
            self.raw.append(nn.Parameter(layer.get_parameter("weight_hh_l0").detach().clone()))
            del layer._parameters["weight_hh_l0"]
            layer.flatten_parameters = lambda: None  # type: ignore[method-assign]

    def forward(self, words: Tensor, states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, list]:
        config = self.config
        mask = torch.empty(self.embedding.num_embeddings, 1, device=words.device).bernoulli_(0.9) / 0.9
        hidden = locked(F.embedding(words, self.embedding.weight * mask), config.input_dropout)
        after = []
        for number, layer in enumerate(self.layers):
            layer.weight_hh_l0 = F.dropout(self.raw[number], config.weight_dropout)
            hidden, state = layer(hidden, states[number])
            after.append((state[0].detach(), state[1].detach()))
            raw = hidden
            hidden = locked(hidden, config.output_dropout if number == config.layers - 1 else config.hidden_dropout)
        return self.decoder(hidden.flatten(0, 1)), raw, hidden, after


def locked(hidden: Tensor, p: float) -> Tensor:
    return hidden * (hidden.new_empty(1, *hidden.shape[1:]).bernoulli_(1 - p) / (1 - p))


def usual_step(config: LstmConfig, options: Options, text: Tensor) -> Callable[[], None]:
    warnings.filterwarnings("ignore", message="RNN module weights")
    torch.manual_seed(1)
    model = UsualModel(config, options.vocabulary).to(text.device).train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, weight_decay=DECAY)
    ids = text - FIRST_ID
    widths = [config.hidden_width] * (config.layers - 1) + [config.width]
    zero = [torch.zeros(1, text.shape[1], width, device=text.device) for width in widths]
    states = [[(state, state) for state in zero]]

    def step() -> None:
        optimizer.zero_grad()
        scores, raw, dropped, states[0] = model(ids[:-1], states[0])
        loss = F.cross_entropy(scores, ids[1:].flatten())
        loss = loss + AR * dropped.pow(2).mean() + TAR * (raw[1:] - raw[:-1]).pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
