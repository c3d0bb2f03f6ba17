"""Models from and for other programs, and what memories cost."""

import argparse
from pathlib import Path

from distlm.commands.shared import Add, config_of, one_line, print_once
from distlm.errors import UsageError
from distlm.runtime.ranks.world import World


def add_verbs(add: Add) -> None:
    """import …, export hf, memory bench."""
    child = add(
        "import awd-lstm", "a state dict of salesforce/awd-lstm-lm or fastai becomes a checkpoint", _import_lstm
    )
    child.add_argument("--weights", required=True, help="state dict: .pt, .pth or .safetensors")
    child.add_argument(
        "--vocabulary",
        help="words in the order of the embedding's rows, one per line; default: as they first come in the text",
    )
    child = add(
        "import fairseq", "a checkpoint of fairseq's transformer_lm_wiki103 becomes a checkpoint", _import_fairseq
    )
    child.add_argument("--weights", required=True, help="checkpoint of fairseq, e.g. checkpoint_best.pt")
    child.add_argument("--dictionary", required=True, help="dict.txt of the data that the model was trained on")
    add("import hf", "a causal language model of Hugging Face (hf.name) becomes a checkpoint as it is", _import_hf)
    child = add(
        "export hf", "a masked language model as a Hugging Face folder, its memory in files beside it", _export_hf
    )
    child.add_argument("--out", required=True, help="folder to write")
    child = add("memory bench", "what memories cost in inference and training (Kim & Jung, table 1)", _memory_bench)
    child.add_argument("--tokens", type=int, default=128, help="tokens of a row; default 128")
    child.add_argument("--turns", type=int, default=20, help="each model is timed so often; default 20")
    child.add_argument(
        "--train-rows", type=int, default=8, help="rows of a training step; 0: inference only; default 8"
    )


def _import_lstm(options: argparse.Namespace, world: World) -> int:
    from distlm.models.awd_lstm.importer import import_awd_lstm

    config = config_of(options)
    words = Path(options.vocabulary) if options.vocabulary else None
    return print_once(f"import awd-lstm: {one_line(import_awd_lstm(config, Path(options.weights), words))}", world)


def _import_fairseq(options: argparse.Namespace, world: World) -> int:
    from distlm.models.transformer.importer import import_fairseq

    found = import_fairseq(config_of(options), Path(options.weights), Path(options.dictionary))
    return print_once(f"import fairseq: {one_line(found)}", world)


def _import_hf(options: argparse.Namespace, world: World) -> int:
    from distlm.models.hf.job import import_hf

    return print_once(f"import hf: {one_line(import_hf(config_of(options)))}", world)


def _export_hf(options: argparse.Namespace, world: World) -> int:
    from distlm.data.shards.files import TOKENIZER_FOLDER
    from distlm.models.plm.export import save_pretrained
    from distlm.models.plm.io import load_plm
    from distlm.runtime.ranks.collective import rank0_first
    from distlm.runtime.ranks.comm import open_comm
    from distlm.runtime.rundir import RunDir

    config = config_of(options)
    run, out = RunDir(Path(config.run_dir)), Path(options.out)

    def export() -> Path:
        checkpoint, tokenizer = run.newest_checkpoint(), run.shards(config) / TOKENIZER_FOLDER
        save_pretrained(load_plm(checkpoint)[0], out, tokenizer if tokenizer.is_dir() else None)
        return checkpoint

    comm = open_comm(world)
    checkpoint = rank0_first(comm, export)
    comm.close()
    return print_once(f"export hf: {checkpoint} as {out}", world)


def _memory_bench(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.tables import markdown
    from distlm.models.device import default_device
    from distlm.models.plm.measure.bench import bench_table, run_bench
    from distlm.runtime.progress import say

    for name in ("tokens", "turns"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least 1")
    config = config_of(options)
    if options.tokens > config.plm.max_positions:
        raise UsageError(
            f"--tokens {options.tokens}: the model takes at most plm.max_positions={config.plm.max_positions}"
        )
    device = default_device()
    precision = "fp32" if device.type == "cpu" else config.train.precision
    say(f"memory bench: on {device.type} in {precision}", world.rank)
    found = run_bench(config, options.tokens, options.turns, options.train_rows, device, precision)
    return print_once(markdown(*bench_table(found)), world)
