"""What more ranks bring where a store is small: one shard of keys, a few thousand evaluated tokens.

A one-layer model with random weights writes its datastore and searches neighbours on 1 and on more ranks of one thread
each. Its cost is that of its parameters, however many layers they are in: by default the layer has 98 M, about as many
as 8 layers of that width with a feed-forward of 4,096. Either number of ranks has --repeat turns, and the one that
began a turn is second in the next. Seconds are those that the stages record; seconds of processor are those of all
processes of a command, their start included. The bytes must be the same in every turn. `planned` is what `distlm plan`
counts with. Turns that are whole are kept in --folder; one that was ended early is done anew.

    python benchmarks/units.py [--rows 180000] [--queries 14000] [--width 1024] [--ffn-width 46000] [--ranks 2]
        [--repeat 2] [--stages write search] [--folder FOLDER] [--out FILE.json]
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.command import Benchmark, Options, note, report
from shared.text import write_text

from distlm.config import RunConfig, load_config
from distlm.datastore.estimate import plan_datastore
from distlm.knnlm.plan import plan_search
from distlm.pipeline import stage_environment, verb_command
from distlm.runtime.child import waited_for_s
from distlm.runtime.files import file_hash, write_json
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.rundir import RunDir
from distlm.runtime.units.planned import speedup

LINE = 20
"""Tokens of a line of the text, about."""
VERBS = {"write": "datastore write", "search": "knn search"}
OWN = {"write": "datastore.folder", "search": "knn.folder"}
"""The setting that says where a turn writes."""
PLANS = {"write": plan_datastore, "search": plan_search}


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, rows=6000, queries=1000, width=32, ffn_width=64, heads=2, context_window=32, block=96,
        factory="IVF16,SQ8", k=64, repeat=1,
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=180_000)
    parser.add_argument("--queries", type=int, default=14_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ffn-width", type=int, default=46_000)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--context-window", type=int, default=128)
    parser.add_argument("--block", type=int, default=896)
    parser.add_argument("--factory", default="IVF256,SQ8")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2, help="turns of either number of ranks")
    parser.add_argument("--stages", nargs="+", choices=list(VERBS), default=list(VERBS))
    parser.add_argument("--folder", type=Path, help="where the runs lie, and go on; default: a temporary")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report(measure(options, options.folder or Path(folder)), options)


def measure(options: Options, folder: Path) -> dict[str, object]:
    """Seconds of each stage on one rank and on more, and their ratios, measured and planned."""
    if options.ranks < 2 or options.repeat < 1:
        parser().error(f"--ranks={options.ranks} --repeat={options.repeat}: at least 2 ranks and 1 turn")
    folder.mkdir(parents=True, exist_ok=True)
    asked = {name: value for name, value in vars(options).items() if name not in ("folder", "out", "repeat", "stages")}
    if (made := folder / "asked.json").is_file() and json.loads(made.read_text("utf-8")) != asked:
        parser().error(f"{made}: of other options; give them again, or another --folder")
    run, text = folder / "run", folder / "text"
    if not made.is_file():
        shutil.rmtree(text, ignore_errors=True)
        write_text(text, sentences=options.rows // LINE)
        lines = (text / "valid.txt").read_text("utf-8").splitlines()
        (text / "valid.txt").write_text("\n".join(lines[: options.queries // LINE]) + "\n", "utf-8")
        write_json(made, asked)
    shared = settings(options, run, text)
    for verb in ("data prepare", "train"):
        start(verb, 1, shared)
    config = load_config("demo", shared)
    figures: dict[str, object] = {"rows": plan_datastore(config, 1).work, "queries": plan_search(config, 1).work}
    for stage in options.stages:
        if stage == "search":
            start("datastore write", 1, shared)
            start("index build", 1, shared)
        figures[stage] = compare(stage, options, config, folder, shared)
    return figures


def settings(options: Options, run: Path, text: Path) -> list[str]:
    """Of a run of such a model."""
    length = options.context_window + options.block
    return [
        f"run_dir={run}", "data.source=folder", f"data.text_dir={text}", "data.max_words=0", "model.layers=1",
        f"model.width={options.width}", f"model.heads={options.heads}", f"model.ffn_width={options.ffn_width}",
        "model.cutoffs=[200,600]", f"model.max_positions={length}", "train.tokens_per_sample=32",
        "train.blocks_per_update=1", "train.micro_blocks=1", "train.updates=1", "train.warmup_updates=0",
        "train.valid_every=0", "train.save_every=0", f"datastore.context_window={options.context_window}",
        f"datastore.block={options.block}", "datastore.batch_blocks=2", "datastore.tap=output",
        "datastore.rows_per_shard=1000000",
        f"index.factory={options.factory}", f"knn.context_window={length // 2}", f"knn.block={length // 2}",
        "knn.batch_blocks=2", f"knn.k={options.k}", "knn.nprobe=8", "knn.splits=[valid]", "knn.ks=[]",
        "launch.threads=1",
    ]  # fmt: skip


def start(verb: str, ranks: int, words: Sequence[str]) -> float:
    """One stage on so many ranks, in processes of its own; their seconds of processor."""
    config = load_config("demo", words)
    command = verb_command(verb, config, "demo", words, ranks)
    before = waited_for_s()
    with stage_environment(config) as environment:
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"exit {done.returncode}: {subprocess.list2cmdline(command)}")
    return waited_for_s() - before


def compare(stage: str, options: Options, config: RunConfig, folder: Path, shared: Sequence[str]) -> dict[str, object]:
    """One stage on one rank and on more, in turns: seconds, bytes, speed-up."""
    ranks = options.ranks
    turns: dict[int, list[dict[str, Any]]] = {1: [], ranks: []}
    for number in range(options.repeat):
        for count in (1, ranks) if number % 2 == 0 else (ranks, 1):
            turns[count].append(turn(stage, count, folder / f"{stage}-{count}-{number}", shared))
    written = [one["bytes"] for found in turns.values() for one in found]
    if any(found != written[0] for found in written):
        sys.exit(f"{stage}: {ranks} ranks wrote other bytes than one, or one turn than another")
    units = PLANS[stage](config, 1).units
    found: dict[str, object] = {"units": units}
    for name in ("seconds", "processor_s"):
        found[name] = {str(count): [round(one[name], 2) for one in turns[count]] for count in turns}
    alone, together = (statistics.median(one["seconds"] for one in turns[count]) for count in (1, ranks))
    work = [statistics.median(one["processor_s"] for one in turns[count]) for count in (ranks, 1)]
    return found | {
        "times_as_fast": round(alone / together, 3),
        "processor, ranks / one": round(work[0] / work[1], 3),
        "planned": {str(count): round(speedup(units, count), 3) for count in (2, 4, 8)},
    }


def turn(stage: str, ranks: int, into: Path, shared: Sequence[str]) -> dict[str, Any]:
    """One turn of a stage, or what is kept of it; only its figures and checksums stay."""
    kept = into.with_name(f"{into.name}.json")
    # Of a turn that was ended early the rest alone would be timed.
    shutil.rmtree(into, ignore_errors=True)
    if not kept.is_file():
        note(f"{VERBS[stage]} on {ranks} rank{'s' * (ranks > 1)}")
        words = [*shared, f"{OWN[stage]}={into}"]
        worked = start(VERBS[stage], ranks, words)
        lines = RunDir.of(load_config("demo", words)).metrics.read(VERBS[stage])
        took = [line.values[STAGE_SECONDS] for line in lines if STAGE_SECONDS in line.values]
        written = {str(path.relative_to(into)): file_hash(path) for path in sorted(into.rglob("*.npy"))}
        write_json(kept, {"seconds": took[-1], "processor_s": worked, "bytes": written})
        shutil.rmtree(into)
    figures: dict[str, Any] = json.loads(kept.read_text("utf-8"))
    return figures


if __name__ == "__main__":
    main()
