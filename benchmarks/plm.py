"""Training a small masked language model: distlm's against a plain loop of transformers.

Both train recipe plm-small's BERT without memory on the same rows with the same masks, rate and number of updates,
one process each, in turns. The plain loop is what a script without a framework does: BertForMaskedLM with labels,
cross-entropy over all tokens, clipping, torch's AdamW; in a second form its head sees the predicted tokens only.
Reported are seconds per update (best turn; starts, validation and saving left out), peak resident bytes, and the
perplexity of the validation rows' masked tokens at the end, which must agree up to the first weights.

    python benchmarks/plm.py --text FOLDER [--updates 200] [--row-tokens 128] [--threads 1] [--repeat 2]
"""

import json
import math
import tempfile
import time
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from shared import process
from shared.clock import own_peak
from shared.command import NO_FIGURES, Benchmark, Options
from shared.run import distlm, training_figures
from shared.text import write_text

from distlm.config import load_config
from distlm.data.shards.reader import ShardRows
from distlm.models.plm.config import PlmRun
from distlm.models.plm.measure.validate import masked_batch
from distlm.models.plm.text.masking import NO_LABEL, mask_rows
from distlm.optim.schedule import learning_rate

RECIPE, VALID_ROWS = "plm-small", 512
WAYS = ("distlm", "transformers", "transformers, predicted tokens only")


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, updates=4, first=2, row_tokens=16, vocabulary=300, rows=4, repeat=1)
    parser.add_input("--text", "folder of {train,valid,test}.txt(.xz, .gz)")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--first", type=int, default=20, help="updates that are not measured, half of them at most")
    parser.add_argument("--row-tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=32, help="rows of an update")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--worker", nargs=2, help=SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    if options.updates < 2 * options.first:
        parser().error(f"--updates={options.updates}: the first {options.first} are not measured; give twice as many")
    if options.worker:
        way, folder = options.worker
        print(json.dumps(ours(Path(folder), options) if way == "distlm" else plain(way, Path(folder), options)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.text = options.text or write_text(folder / "text", sentences=300)
        distlm(["data", "shard", RECIPE, *settings(folder / "prepare", options)])
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(options.repeat):
            for way in WAYS:
                found[way].append(measure(way, folder / f"turn-{turn}", options))
                print(f"turn {turn + 1}: {way}: {found[way][-1]}", flush=True)
    best = {way: min(turn["seconds_per_update"] for turn in turns) for way, turns in found.items()}
    print(f"\n{'':36}  s/update  others / distlm  peak GB  valid perplexity")
    for way in WAYS:
        last = found[way][-1]
        ratio, peak = best[way] / best["distlm"], last["peak_bytes"] / 1e9
        print(f"{way:36}  {best[way]:8.3f}  {ratio:15.2f}  {peak:7.2f}  {last['perplexity']:16.2f}")
    if options.quick:
        print(NO_FIGURES)


def settings(folder: Path, options: Options) -> list[str]:
    """Overrides of the recipe; the shards lie beside the run's folder."""
    return [
        f"run_dir={folder}", f"shards.text_dir={options.text}", f"shards.folder={folder.parent / 'shards'}",
        f"shards.row_tokens={options.row_tokens}", f"shards.vocabulary_size={options.vocabulary}",
        f"train.updates={options.updates}", "train.valid_every=0", "train.save_every=0",
        f"train.log_every={options.first}", f"train.warmup_updates={options.first}",
        f"train.blocks_per_update={options.rows}", f"train.micro_blocks={options.rows}",
        "plm.short_rows=[]", "plm.short_updates=[]", "launch.ranks=1", f"launch.threads={options.threads}",
    ]  # fmt: skip


def measure(way: str, folder: Path, options: Options) -> dict[str, float]:
    """One way, in a process of its own."""
    names = ("text", "updates", "first", "row_tokens", "vocabulary", "rows", "threads")
    words = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    started = process.start(__file__, [*words, "--worker", way, folder], options.threads)
    figures: dict[str, float] = process.result(started)
    return figures


def ours(folder: Path, options: Options) -> dict[str, float]:
    """`distlm train`, in this process."""
    distlm(["train", RECIPE, *settings(folder, options)])
    return {**training_figures(folder), "peak_bytes": own_peak()}


def plain(way: str, folder: Path, options: Options) -> dict[str, float]:
    """The plain loop, in this process."""
    from transformers import BertConfig, BertForMaskedLM

    torch.set_num_threads(options.threads)
    config, all_tokens = load_config(RECIPE, settings(folder, options)), way == "transformers"
    assert isinstance(config, PlmRun)
    train, plm = config.train, config.plm
    shards = Path(config.shards.folder)
    rows, valid = ShardRows.open(shards, "train"), ShardRows.open(shards, "valid")
    torch.manual_seed(train.seed)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=rows.vocabulary, hidden_size=plm.width, num_hidden_layers=plm.layers,
            num_attention_heads=plm.heads, intermediate_size=plm.ffn_width, max_position_embeddings=plm.max_positions,
            hidden_dropout_prob=plm.dropout, attention_probs_dropout_prob=plm.attention_dropout,
            initializer_range=plm.init_std,
        )
    )  # fmt: skip
    first, second = train.adam_betas
    optimizer = torch.optim.AdamW(model.parameters(), betas=(first, second), weight_decay=train.weight_decay)

    def loss(inputs: torch.Tensor, labels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": inputs, "attention_mask": text.long()}
        if all_tokens:
            return model(**given, labels=labels).loss
        hidden, predicted = model.bert(**given).last_hidden_state, labels != NO_LABEL
        return F.cross_entropy(model.cls(hidden[predicted]), labels[predicted])

    began = 0.0
    for update in range(train.updates):
        if update == options.first:
            began = time.perf_counter()
        batch = rows.rows_for_update(train.seed, update, train.blocks_per_update)
        inputs, labels = mask_rows(batch.tokens, batch.rows, batch.epochs, train.seed, rows.tokenizer, plm.mask_share)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, update)
        optimizer.zero_grad()
        loss(*(torch.from_numpy(x) for x in (inputs, labels, rows.is_text(batch.tokens)))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
    seconds = (time.perf_counter() - began) / (train.updates - options.first)
    return {
        "seconds_per_update": seconds,
        "peak_bytes": own_peak(),
        "perplexity": math.exp(validate(loss, valid, config)),
    }


@torch.no_grad()
def validate(loss: Any, valid: ShardRows, config: PlmRun) -> float:
    """Mean over all masked tokens of the split, with distlm's masks."""
    total = count = 0.0
    for start in range(0, len(valid), VALID_ROWS):
        numbers = np.arange(start, min(start + VALID_ROWS, len(valid)))
        inputs, labels, text, _ = masked_batch(valid, numbers, config.train.seed, config.plm.mask_share)
        number = int((labels != NO_LABEL).sum())
        total += float(loss(inputs, labels, text)) * number
        count += number
    return total / count


if __name__ == "__main__":
    main()
