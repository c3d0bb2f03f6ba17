"""Training a small masked language model: distlm's against a plain loop of transformers.

Both train recipe plm-small's BERT without memory on the same rows with the same masks, rate and number of updates,
one process each, in turns. The plain loop is what a script without a framework does: BertForMaskedLM with labels,
cross-entropy over all tokens, clipping, torch's AdamW; in a second form its head sees the predicted tokens only.
Reported are seconds per update (best turn; starts, validation and saving left out), peak resident bytes, and the
perplexity of the validation rows' masked tokens at the end, which must agree up to the first weights.

    python benchmarks/plm.py --text FOLDER [--updates 200] [--row-tokens 128] [--threads 1] [--repeat 2]
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from distlm.config import load_config
from distlm.config.schema import RunConfig
from distlm.data.shards.reader import ShardRows
from distlm.models.plm.measure.validate import masked_batch
from distlm.models.plm.text.masking import NO_LABEL, mask_rows
from distlm.optim.schedule import learning_rate

RECIPE, FIRST, VALID_ROWS = "plm-small", 20, 512
WAYS = ("distlm", "transformers", "transformers, predicted tokens only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of {train,valid,test}.txt(.xz, .gz)")
    parser.add_argument("--updates", type=int, default=200, help=f"at least {2 * FIRST}")
    parser.add_argument("--row-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.updates < 2 * FIRST:
        parser.error(f"--updates={options.updates}: the first {FIRST} are not measured; give at least {2 * FIRST}")
    if options.worker:
        way, folder = options.worker
        print(json.dumps(work(way, Path(folder), options)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(["-m", "distlm", "data", "shard", RECIPE, *settings(folder / "prepare", options)])
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(options.repeat):
            for way in WAYS:
                words = [__file__, *sys.argv[1:], "--worker", way, str(folder / f"turn-{turn}")]
                found[way].append(json.loads(run(words).splitlines()[-1]))
                print(f"turn {turn + 1}: {way}: {found[way][-1]}", flush=True)
    best = {way: min(turn["seconds_per_update"] for turn in turns) for way, turns in found.items()}
    print(f"\n{'':36}  s/update  others / distlm  peak GB  valid perplexity")
    for way in WAYS:
        last = found[way][-1]
        ratio, peak = best[way] / best["distlm"], last["peak_bytes"] / 1e9
        print(f"{way:36}  {best[way]:8.3f}  {ratio:15.2f}  {peak:7.2f}  {last['perplexity']:16.2f}")


def settings(folder: Path, options: argparse.Namespace) -> list[str]:
    """Overrides of the recipe; the shards lie beside the run's folder."""
    return [
        f"run_dir={folder}", f"shards.text_dir={options.text}", f"shards.folder={folder.parent / 'shards'}",
        f"shards.row_tokens={options.row_tokens}", f"train.updates={options.updates}", "train.valid_every=0",
        "train.save_every=0", f"train.log_every={FIRST}", f"train.warmup_updates={FIRST}", "launch.ranks=1",
        f"launch.threads={options.threads}", "plm.short_rows=[]", "plm.short_updates=[]",
        "train.blocks_per_update=32", "train.micro_blocks=32",
    ]  # fmt: skip


def run(words: list[str]) -> str:
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit {done.returncode}: {' '.join(words)}")
    return done.stdout


def work(way: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    overrides = settings(folder, options)
    if way == "distlm":
        run(["-m", "distlm", "train", RECIPE, *overrides])
        return distlm_figures(folder)
    torch.set_num_threads(options.threads)
    return plain(load_config(RECIPE, overrides), all_tokens=way == "transformers")


def distlm_figures(folder: Path) -> dict[str, float]:
    """Off metrics.jsonl: lines come every FIRST updates, the first of which hold the start."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    seconds = (logged[-1]["time"] - logged[0]["time"]) / (logged[-1]["step"] - logged[0]["step"])
    loss = next(line["valid/loss"] for line in reversed(lines) if "valid/loss" in line)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds_per_update": seconds, "peak_bytes": peak, "perplexity": math.exp(loss)}


def plain(config: RunConfig, all_tokens: bool) -> dict[str, float]:
    from transformers import BertConfig, BertForMaskedLM

    train, plm = config.train, config.plm
    folder = Path(config.shards.folder)
    rows, valid = ShardRows.open(folder, "train"), ShardRows.open(folder, "valid")
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
        if update == FIRST:
            began = time.perf_counter()
        batch = rows.rows_for_update(train.seed, update, train.blocks_per_update)
        inputs, labels = mask_rows(batch.tokens, batch.rows, batch.epochs, train.seed, rows.tokenizer, plm.mask_share)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, update)
        optimizer.zero_grad()
        loss(*(torch.from_numpy(x) for x in (inputs, labels, rows.is_text(batch.tokens)))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
    seconds = (time.perf_counter() - began) / (train.updates - FIRST)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds_per_update": seconds, "peak_bytes": peak, "perplexity": math.exp(validate(loss, valid, config))}


@torch.no_grad()
def validate(loss: Any, valid: ShardRows, config: RunConfig) -> float:
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
