"""Models from and for other programs, fine-tuned ones, too, and what memories cost."""

import argparse
from functools import partial
from importlib import import_module

from distlm.commands.parser import Commands
from distlm.commands.shared import config_of, one_line, print_once, refuse_ranks
from distlm.errors import UsageError
from distlm.models.kind import Exchange
from distlm.models.registry import kind, kind_names
from distlm.runtime.ranks.world import World


def add_verbs(commands: Commands) -> None:
    """import …, export …, memory bench."""
    commands.add_group("import", "models of other programs become checkpoints", partial(_add, commands, "import"))
    commands.add_group("export", "checkpoints become models of other programs", partial(_add, commands, "export"))
    add = commands.add
    child = add("memory bench", "what memories cost in inference and training (Kim & Jung, table 1)", _memory_bench)
    child.add_argument("--tokens", type=int, default=128, help="tokens of a row; default 128")
    child.add_argument("--turns", type=int, default=20, help="each model is timed so often; default 20")
    child.add_argument(
        "--train-rows", type=int, default=8, help="rows of a training step; 0: inference only; default 8"
    )


def _add(commands: Commands, verb: str) -> None:
    """The kinds of model say what they import and export; a verb of several kinds is one for each of their runs."""
    found: dict[str, dict[str, Exchange]] = {}
    for name in kind_names():
        for exchange in kind(name).importers if verb == "import" else kind(name).exporters:
            found.setdefault(exchange.name, {})[name] = exchange
    for word, by_kind in found.items():
        first = next(iter(by_kind.values()))
        child = commands.add(
            f"{verb} {word}", first.summary, _exchange, exchanges=by_kind, exchange_verb=f"{verb} {word}"
        )
        first.arguments(child)
    if verb == "export":
        summary = "the same as export hf --finetuned, for the fine-tuning that finetune.name and finetune.task name"
        child = commands.add("export finetuned", summary, _export_finetuned)
        child.add_argument("--out", required=True, help="folder to write")
        child.add_argument("--seed", type=int, help="which of finetune.seeds; may be left out where one was kept")


def _exchange(options: argparse.Namespace, world: World) -> int:
    """Models from and to other programs, each in the way of its kind of model. Rank 0 works."""
    from distlm.runtime.ranks.collective import rank0_first
    from distlm.runtime.ranks.comm import open_comm

    config, verb = config_of(options), options.exchange_verb
    if getattr(options, "finetuned", None) is not None:
        return _export_finetuned(options, world)
    able = options.exchanges
    exchange = next((able[name] for name in able if kind(name) is kind(config.model.kind)), None)
    if exchange is None:
        raise UsageError(f"`distlm {verb}` is for model.kind={' and '.join(able)}, not {config.model.kind}")
    module, _, name = exchange.run.partition(":")
    comm = open_comm(world)
    found = rank0_first(comm, lambda: getattr(import_module(module), name)(config, options))
    comm.close()
    return print_once(f"{verb}: {one_line(found)}", world)


def _export_finetuned(options: argparse.Namespace, world: World) -> int:
    from distlm.finetune.finished.export import export_finetuned
    from distlm.models.plm.config import PlmRun

    verb = getattr(options, "exchange_verb", "export finetuned")
    refuse_ranks(world, verb, "writes one folder")
    config = config_of(options)
    if not isinstance(config, PlmRun):
        raise UsageError(f"`distlm {verb}` of a fine-tuned model is for model.kind=plm, not {config.model.kind}")
    if getattr(options, "finetuned", None):
        config.finetune.name = options.finetuned
    return print_once(f"{verb}: {one_line(export_finetuned(config, options))}", world)


def _memory_bench(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.tables import markdown
    from distlm.models.plm.config import PlmRun
    from distlm.models.plm.measure.bench import bench_table, run_bench
    from distlm.runtime.progress import say
    from distlm.runtime.ranks.device import default_device

    for name in ("tokens", "turns"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least 1")
    config = config_of(options)
    if not isinstance(config, PlmRun):
        raise UsageError(f"`distlm memory bench` is for model.kind=plm, not {config.model.kind}")
    if options.tokens > config.plm.max_positions:
        raise UsageError(
            f"--tokens {options.tokens}: the model takes at most plm.max_positions={config.plm.max_positions}"
        )
    device = default_device()
    precision = "fp32" if device.type == "cpu" else config.train.precision
    say(f"memory bench: on {device.type} in {precision}", world.rank)
    found = run_bench(config, options.tokens, options.turns, options.train_rows, device, precision)
    return print_once(markdown(*bench_table(found)), world)
