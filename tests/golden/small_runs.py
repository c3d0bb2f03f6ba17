"""Five small runs on one rank and on two, by nothing of distlm but its command line: any version can make them."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

ON_ALL_RANKS = ("data shard", "train", "finetune", "datastore write", "index build", "knn search", "knn cache")
BLOCKS = [
    "train.tokens_per_sample=64", "train.blocks_per_update=4", "train.micro_blocks=1", "train.updates=12",
    "train.warmup_updates=2", "train.valid_every=6", "train.save_every=4", "train.log_every=1",
]  # fmt: skip
SCORING = ["datastore.context_window=32", "datastore.block=32", "knn.context_window=32", "knn.block=32",
           "knn.batch_blocks=4", "knn.blocks_per_unit=8"]  # fmt: skip
SEARCH = [*SCORING, "datastore.batch_blocks=4", "datastore.rows_per_shard=512", "index.factory=IVF16,PQ4",
          "index.sample=4096", "knn.k=16", "knn.nprobe=4", "knn.ks=[4,16]"]  # fmt: skip
KNN_VERBS = ["data prepare", "train", "datastore write", "index build", "knn search", "knn tune", "knn evaluate"]

# Run → recipe, verbs, settings (only those that the run's kind of model reads).
RUNS: dict[str, tuple[str, list[str], list[str]]] = {
    "knn": ("demo", [*KNN_VERBS, "report"], [
        *BLOCKS, *SEARCH, "data.source=folder", "data.text_dir=inputs/text", "model.layers=2", "model.width=32",
        "model.heads=2", "model.ffn_width=64", "model.cutoffs=[20,40]", "model.max_positions=96", "train.lr=0.002",
        "train.l2_weight=0.1",
    ]),
    # Epoch 5 triggers NT-ASGD, two epochs of fine-tuning follow, and the checkpoint of update 400 is in mid-epoch.
    "awd_lstm": ("awd-lstm-small", [
        "data prepare", "train", "evaluate", "knn cache", "knn tune", "knn evaluate",
    ], [
        *SCORING, "knn.carry=false", "data.text_dir=inputs/text", "lstm.width=12", "lstm.hidden_width=16",
        "awd.batch=8", "awd.bptt=12",
        "awd.epochs=6", "awd.finetune_epochs=2", "awd.valid_batch=4", "train.lr=20", "train.save_every=80",
        "cache.use=true", "cache.windows=[20,50]",
    ]),
    "hf": ("hf", KNN_VERBS, [
        *BLOCKS, *SEARCH, "data.text_dir=inputs/text", "data.tokenizer=inputs/gpt2", "hf.name=inputs/gpt2",
        "train.lr=0.003",
    ]),
    "plm": ("plm-small-resm", ["data shard", "train", "evaluate", "export hf --out {run}/export"], [
        "shards.text_dir=inputs/text", "shards.row_tokens=24", "shards.vocabulary_size=120", "shards.chunk_rows=16",
        "shards.shard_text=6000", "plm.layers=3", "plm.width=32", "plm.heads=2", "plm.ffn_width=48",
        "plm.max_positions=24", "plm.dropout=0.1", "plm.attention_dropout=0.1", "plm.short_rows=[12]",
        "plm.short_updates=[3]", "memory.positions=[1,3]", "memory.sub_keys=8", "memory.heads=2", "memory.k=4",
        "memory.key_width=8", "memory.value_dropout=0.1", "memory.query_dropout=0.1", "train.blocks_per_update=16",
        "train.micro_blocks=8", "train.updates=12", "train.warmup_updates=2", "train.valid_every=6",
        "train.save_every=4", "train.log_every=1",
    ]),
    "finetune": ("plm-small-resm", ["finetune"], [
        "finetune.checkpoint=plm-{ranks}", "finetune.tokenizer=plm-{ranks}/shards/tokenizer",
        "finetune.data_dir=inputs/glue", "finetune.task=SST-2", "finetune.seeds=[1,2]", "finetune.epochs=2",
        "finetune.rows_per_update=16", "finetune.length=24", "finetune.lr=0.003", "finetune.memory=updated",
        "finetune.keep_models=true",
    ]),
}  # fmt: skip


def make_runs(out: Path) -> None:
    """OUT/inputs, OUT/RUN-RANKS and OUT/logs. `out` must be new."""
    out.mkdir(parents=True)
    write_text(out / "inputs" / "text")
    write_task(out / "inputs" / "glue" / "SST-2")
    save_gpt2(out / "inputs" / "gpt2", out / "inputs" / "text" / "train.txt")
    for ranks in (1, 2):
        for name, (recipe, verbs, settings) in RUNS.items():
            run = f"{name}-{ranks}"
            words = [recipe, *settings, "launch.threads=1", "run_dir={run}"]
            for verb in verbs:
                command = [word.format(run=run, ranks=ranks) for word in [*verb.split(), *words]]
                start(out, command, ranks if verb in ON_ALL_RANKS else 1, f"{run} {verb.partition(' --')[0]}")


def start(out: Path, words: list[str], ranks: int, title: str) -> None:
    """`python -m distlm WORDS` in `out`, so that paths are relative; its output goes to a log."""
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_osc": "^ucx",
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    log = out / "logs" / f"{title.replace(' ', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    print(title, flush=True)
    with log.open("w", encoding="utf-8") as stream, TemporaryDirectory(prefix="distlm-golden-") as session:
        mpirun = [str(Path(sys.executable).with_name("mpirun")), "--prtemca", "prte_tmpdir_base", session]
        mpirun += ["--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
        command = [*(mpirun if ranks > 1 else []), sys.executable, "-m", "distlm", *words]
        done = subprocess.run(command, cwd=out, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{title} ended with {done.returncode}; the end of {log}:\n{log.read_text('utf-8')[-3000:]}")


def write_text(folder: Path) -> None:
    """{train,valid,test}.txt: Zipf-like words in lines of 3 to 19, some lines blank."""
    folder.mkdir(parents=True)
    random, weights = np.random.default_rng(0), 1 / np.arange(1, 61)
    for split, lines in (("train", 400), ("valid", 50), ("test", 50)):
        lengths = [int(random.integers(3, 20)) if random.random() > 0.1 else 0 for _ in range(lines)]
        rows = [random.choice(60, size=length, p=weights / weights.sum()) for length in lengths]
        (folder / f"{split}.txt").write_text("".join(_line(row) + "\n" for row in rows), "utf-8")


def write_task(folder: Path) -> None:
    """A task of GLUE in the words of the text: are most of a sentence's words even ones?"""
    folder.mkdir(parents=True)
    random = np.random.default_rng(1)
    for split, count in (("train", 96), ("dev", 40)):
        rows = [random.integers(0, 60, int(random.integers(3, 12))) for _ in range(count)]
        lines = [f"{_line(row)} \t{int((row % 2).mean() < 0.5)}\n" for row in rows]
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(lines), "utf-8")


def _line(words: np.ndarray) -> str:
    return " ".join(f"w{word}" for word in words)


def save_gpt2(folder: Path, text: Path) -> None:
    """A GPT-2 of two layers of width 32, fresh, with a byte-level BPE of the text."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text)], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), **sizes, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
