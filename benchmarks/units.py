"""What more ranks bring where a store is small: one shard of keys, a few thousand evaluated tokens.

A one-layer model with random weights (its cost is that of its parameters, however many layers they are in) writes its
datastore and searches neighbours on 1 and on more ranks of one thread each, in turns; the seconds are those that the
stages record, their bytes are compared. `planned` is what `distlm plan` counts with.

    python benchmarks/units.py [--rows 180000] [--queries 14000] [--width 1024] [--ffn-width 12000] [--ranks 2]
        [--stages write search] [--folder FOLDER] [--out FILE.json]
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shared.command import Benchmark, Options, note, report
from shared.text import write_text

from distlm.config import RunConfig, load_config
from distlm.datastore.estimate import plan_datastore
from distlm.knnlm.plan import plan_search
from distlm.runtime.files import file_hash
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.rundir import RunDir
from distlm.runtime.units.planned import speedup

LINE = 20
"""Tokens of a line of the text, about."""
VERBS = {"write": "datastore write", "search": "knn search"}
PLANS = {"write": plan_datastore, "search": plan_search}


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, rows=6000, queries=1000, width=32, ffn_width=64, heads=2, context_window=32, block=96,
        factory="IVF16,SQ8", k=64,
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=180_000)
    parser.add_argument("--queries", type=int, default=14_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ffn-width", type=int, default=12_000)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--context-window", type=int, default=128)
    parser.add_argument("--block", type=int, default=896)
    parser.add_argument("--factory", default="IVF256,SQ8")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=list(VERBS), default=list(VERBS))
    parser.add_argument("--folder", type=Path, help="where the runs lie; what is there is gone on with; default: none")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report(measure(options, options.folder or Path(folder)), options)


def measure(options: Options, folder: Path) -> dict[str, object]:
    """Seconds of each stage on one rank and on more, and their ratios, measured and planned."""
    run, text = folder / "run", folder / "text"
    if not text.is_dir():
        write_text(text, sentences=options.rows // LINE)
        lines = (text / "valid.txt").read_text("utf-8").splitlines()
        (text / "valid.txt").write_text("\n".join(lines[: options.queries // LINE]) + "\n", "utf-8")
    shared = settings(options, run, text)
    for verb in ("data prepare", "train"):
        start(verb, 1, shared)
    config = load_config("demo", shared)
    figures: dict[str, object] = {"rows": plan_datastore(config, 1).work, "queries": plan_search(config, 1).work}
    for stage in options.stages:
        if stage == "search":
            start("datastore write", 1, shared)
            start("index build", 1, shared)
        figures[stage] = compare(stage, options.ranks, config, folder, shared)
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


def start(verb: str, ranks: int, words: Sequence[str]) -> None:
    """One stage on so many ranks, in processes of its own."""
    launcher = [str(Path(sys.executable).parent / "mpirun"), "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    command = [*(launcher if ranks > 1 else []), sys.executable, "-m", "distlm", *verb.split(), "demo", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit {done.returncode}: {subprocess.list2cmdline(command)}")


def compare(stage: str, ranks: int, config: RunConfig, folder: Path, shared: Sequence[str]) -> dict[str, object]:
    """One stage on one rank and on `ranks`: seconds, bytes, speed-up."""
    seconds, bytes_ = {}, {}
    own = "datastore.folder" if stage == "write" else "knn.folder"
    for count in (1, ranks):
        into = folder / f"{stage}-{count}"
        words = [*shared, f"{own}={into}"]
        note(f"{VERBS[stage]} on {count} rank{'s' * (count > 1)}")
        if not (into / "seconds.json").is_file():
            start(VERBS[stage], count, words)
            lines = list(RunDir.of(load_config("demo", words)).metrics.read(VERBS[stage]))
            took = [line.values[STAGE_SECONDS] for line in lines if STAGE_SECONDS in line.values]
            (into / "seconds.json").write_text(json.dumps(took[-1]))
        seconds[count] = float(json.loads((into / "seconds.json").read_text()))
        bytes_[count] = {str(path.relative_to(into)): file_hash(path) for path in sorted(into.rglob("*.npy"))}
    if bytes_[1] != bytes_[ranks]:
        sys.exit(f"{stage}: {ranks} ranks wrote other bytes than one")
    units = PLANS[stage](config, 1).units
    return {
        "units": units,
        "seconds": {str(count): round(found, 2) for count, found in seconds.items()},
        "times_as_fast": round(seconds[1] / seconds[ranks], 3),
        "planned": {str(count): round(speedup(units, count), 3) for count in (2, 4, 8)},
    }


if __name__ == "__main__":
    main()
