"""All rows of WikiText-103 through every stage, with a small model: what a whole run takes here, against its plan.

A text of --tokens tokens is made of the lines of --text, shuffled anew for every pass over them. A model of one layer
and width 64 is trained for some updates; then datastore, index, search, tuning and evaluation of valid and test run on
--ranks ranks. Each stage runs twice:
  undisturbed   its seconds and the peak memory of each rank, beside the plan, which is compared with the seconds that
                the stage itself records (`stage_s`); `seconds` are those of its processes, start and end included
  with --kill   the same anew, with a SIGKILL of one rank in the middle, and the same command once more; the bytes of
                what it leaves must be those of the undisturbed run. Where the stage was over before the kill came, it
                is killed earlier the next time; where that never succeeds, nothing is said of its bytes
Plans count with what is measured in --folder, not with what other runs took on this machine. The run lies in --folder.
Started again there, it goes on with the stage that was not done. A table (Markdown) is written beside --out. All rows
need some 47 GB of disk, of which 27 GB lie there while neighbours are searched; it is looked for before.

    python benchmarks/full_rows.py --text FOLDER --folder DIR [--tokens 103227021] [--ranks 2] [--out FILE]
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from msgspec import structs
from shared import process
from shared.command import NO_FIGURES, Benchmark, Options, note, report
from shared.text import write_text
from shared.watched import watched

from distlm.config import load_config
from distlm.config.schema import RunConfig
from distlm.datastore.reader import Datastore
from distlm.index.choose.calibrate import AMOUNTS, Amounts, calibrate
from distlm.index.choose.cost import index_costs
from distlm.index.choose.plan import Store
from distlm.index.factory import Factory, fit_factory
from distlm.index.records import Rates
from distlm.pipeline import STEPS, check_settings, plan_step, verb_command, worked_s
from distlm.runtime import speeds
from distlm.runtime.files import file_hash, format_bytes, json_hash, write_json
from distlm.runtime.ranks.cores import share_of_cores
from distlm.runtime.records import SpeedsFile
from distlm.runtime.rundir import RunDir

WHOLE = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
"""Tokens of WikiText-103."""
STAGES = {
    "data prepare": ("tokens",),
    "train": ("checkpoints",),
    "datastore write": ("datastore",),
    "index train": ("index",),
    "index add": ("index/*/parts",),
    "index merge": ("index/*/merged.index", "index/*/.merged.index*", "index/*/index.json"),
    "knn search": ("neighbours",),
    "knn tune": ("tuned", "knn.json"),
    "knn evaluate": ("results", "results.json"),
}
"""Every stage in order, and the files and folders that it leaves."""
ONE_RANK = {"data prepare", "knn tune", "knn evaluate"}
FEW = Amounts(add_s=0.05, disk_bytes=4 << 20, kmeans_keys=1000, transform_keys=(300, 600))
KILLS, EARLIER = 4, 0.7
"""A stage that was over before its kill is killed so many times earlier, at that part of the time before."""
TOKEN_BYTES = 6
"""Of text, for the disk that it needs."""
Figures = dict[str, Any]


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(
        __doc__, tokens=12_000, width=16, nlist=16, code="PQ4", k=16, rows_per_shard=3_000, vocabulary=400,
        kill=["datastore write", "index merge"],
    )  # fmt: skip
    parser.add_input("--text", "a folder of train.txt, valid.txt and test.txt")
    parser.add_argument("--folder", type=Path, help="where text and run lie, and go on; default: a temporary")
    parser.add_argument("--tokens", type=int, default=WHOLE["train"], help="of train; valid and test in proportion")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=0, help="most words; 0: all of the text")
    parser.add_argument("--nlist", type=int, default=4096)
    parser.add_argument("--code", default="PQ16", help="index.factory is IVF<nlist>,<code>")
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--nprobe", type=int, default=8)
    parser.add_argument("--rows-per-shard", type=int, default=1_000_000)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--kill", nargs="*", default=list(STAGES), choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate", nargs=5, help=SUPPRESS)
    parser.add_argument("settings", nargs="*", help="more settings of the run, such as knn.scan=lists")
    parser.add_out()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    if options.calibrate:
        print(json.dumps(rates_here(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if options.text is None:
            options.text = write_text(Path(temporary) / "corpus", sentences=400)
        options.folder = options.folder or Path(temporary)
        options.folder.mkdir(parents=True, exist_ok=True)
        figures = measure(options, options.folder)
        report(figures, options)
    text = table(figures)
    note(text)
    if options.out:
        options.out.with_suffix(".md").write_text((f"{NO_FIGURES}\n\n" if options.quick else "") + text, "utf-8")


def measure(options: Options, folder: Path) -> Figures:
    """Every stage that is not done, and what it took."""
    # Records before the second had no stage_s.
    asked = {"format": "2"} | {
        name: str(value) for name, value in vars(options).items() if name not in ("out", "kill", "folder", "calibrate")
    }
    record = folder / "full_rows.json"
    figures: Figures = {"asked": asked, "stages": {}}
    if record.exists():
        figures = json.loads(record.read_text("utf-8"))
        if figures["asked"] != asked:
            sys.exit(f"{record}: of other options ({figures['asked']}); give them again, or another --folder")
    text = folder / "text"
    if not (text / "made.json").exists():
        require_disk(folder, TOKEN_BYTES * options.tokens, "the text")
        make_text(options, text)
    use_speeds(folder)
    overrides = settings(options, text, folder / "run")
    config = load_config("demo", overrides)
    if any(words not in figures["stages"] for words in STAGES):
        # Of what is there a part may be written already: it is counted once more.
        require_disk(folder, sum(plan.disk_bytes for plan in check_settings(config)), "what is not finished")
    for words in STAGES:
        if words not in figures["stages"]:
            figures["stages"][words] = run_stage(words, config, overrides, options)
            figures["bytes"] = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
            write_json(record, figures)
        note(f"{words}: {figures['stages'][words]}")
    results = json.loads(RunDir.of(config).results.read_text("utf-8"))
    return {
        "tokens": json.loads((text / "made.json").read_text("utf-8")), **figures,
        "stage_s": round(sum(one["stage_s"] for one in figures["stages"].values()), 1),
        "seconds": round(sum(one["seconds"] for one in figures["stages"].values()), 1),
        "planned_s": round(sum(one["planned_s"] for one in figures["stages"].values()), 1),
        "rows": Datastore.open(RunDir.of(config).datastore).rows,
        "perplexity": {
            name: {way: round(split[way]["perplexity"], 2) for way in ("lm", "knn")}
            for name, split in results["splits"].items()
        },
    }  # fmt: skip


def settings(options: Options, text: Path, run: Path) -> list[str]:
    """The run's settings over the recipe `demo`."""
    heads = 4 if options.width % 4 == 0 else 1
    quick = ["train.valid_every=0", "train.save_every=10"] if options.quick else ["train.valid_every=0"]
    return [
        f"run_dir={run}", "data.source=folder", f"data.text_dir={text}", f"data.max_words={options.vocabulary}",
        "model.layers=1", f"model.width={options.width}", f"model.heads={heads}",
        f"model.ffn_width={4 * options.width}",
        "model.cutoffs=[100,200]" if options.quick else "model.cutoffs=[2000,8000]",
        f"train.updates={options.updates if not options.quick else 20}", "train.warmup_updates=10",
        "train.save_every=20", *quick, f"datastore.rows_per_shard={options.rows_per_shard}",
        f"index.factory=IVF{options.nlist},{options.code}", f"index.sample={min(1 << 20, 64 * options.nlist)}",
        f"knn.k={options.k}", f"knn.ks=[{max(1, options.k // 16)},{options.k}]", f"knn.nprobe={options.nprobe}",
        f"launch.ranks={options.ranks}", f"launch.threads={options.threads}", *options.settings,
    ]  # fmt: skip


def make_text(options: Options, folder: Path) -> None:
    """{train,valid,test}.txt of exactly so many tokens; made.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for number, (split, whole) in enumerate(WHOLE.items()):
        wanted = max(200, round(options.tokens * whole / WHOLE["train"])) if split != "train" else options.tokens
        lines = (options.text / f"{split}.txt").read_text("utf-8").splitlines()
        with (folder / f"{split}.txt").open("w", encoding="utf-8") as stream:
            for line in _of_tokens(lines, wanted, random.Random(options.seed + number), split == "train"):
                stream.write(line + "\n")
        made[split] = wanted
        note(f"text: {wanted} tokens of {split}")
    write_json(folder / "made.json", made)


def _of_tokens(lines: list[str], wanted: int, order: random.Random, shuffled: bool) -> Iterator[str]:
    """Lines of `wanted` words in all, each line's end counting as one; the last is cut."""
    left, first = wanted, not shuffled
    while left:
        # Those of valid and test once as they are: WikiText-2 has the same ones as WikiText-103.
        turn = list(lines) if first else order.sample(lines, len(lines))
        first = False
        for line in turn:
            words = line.split()
            if len(words) + 1 > left:
                words = words[: left - 1]
            yield " ".join(words)
            left -= len(words) + 1
            if not left:
                return


def run_stage(words: str, config: RunConfig, overrides: list[str], options: Options) -> Figures:
    """A stage undisturbed, then with a kill where that is asked for."""
    root = Path(config.run_dir)
    clear(root, words)
    planned_s, planned_memory = planned(words, config, options)
    ranks = 1 if words in ONE_RANK else options.ranks
    command = verb_command(words, config, "demo", overrides, ranks)
    log, record, load = root.with_name("stages.log"), RunDir.of(config).metrics.path, os.getloadavg()
    written = record.stat().st_size if record.exists() else 0
    alone = watched(command, config, log)
    if alone.code:
        sys.exit(f"exit {alone.code}: {' '.join(command)}; its output is in {log}")
    stage_s = worked_s(record, written)
    found: Figures = {
        "ranks": ranks, "load": [round(mean, 1) for mean in load], "planned_s": round(planned_s, 1),
        "stage_s": round(stage_s, 1), "seconds": round(alone.seconds, 1),
        "planned_over_measured": round(planned_s / max(stage_s, 0.001), 2),
        "planned_MB": round(planned_memory / 1e6),
        "peak_MB": [round(size / 1e6) for _, size in sorted(alone.resident.items())],
        "own_MB": [round(size / 1e6) for _, size in sorted(alone.own.items())],
        "bytes": sum(path.stat().st_size for path in files(root, words)),
    }  # fmt: skip
    if words in options.kill:
        before = contents(root, words)
        order = random.Random(f"{options.seed} {words}")
        found |= disturbed(words, command, config, alone.seconds * order.uniform(0.4, 0.8), order, log)
        if found["killed"]:
            after = contents(root, words)
            other = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            found |= {"same_bytes": not other, "other_files": other[:8], "files": len(before)}
    return found


def disturbed(
    words: str, command: list[str], config: RunConfig, moment: float, order: random.Random, log: Path
) -> Figures:
    """The stage anew, with a rank killed after `moment` seconds, or earlier where it is over before; then once more."""
    for over in range(KILLS):
        clear(Path(config.run_dir), words)
        ran = watched(command, config, log, moment * EARLIER**over, order)
        if ran.killed:
            break
        if ran.code:
            sys.exit(f"exit {ran.code} without a kill: {' '.join(command)}; its output is in {log}")
        note(f"{words}: over before the kill after {moment * EARLIER**over:.1f} s")
    else:
        return {"killed": False, "over_before": KILLS, "same_bytes": None}
    again = watched(command, config, log)
    if again.code:
        sys.exit(f"exit {again.code} after a kill: {' '.join(command)}; its output is in {log}")
    return {
        "killed": True, "over_before": over, "killed_after_s": round(ran.seconds - ran.noticed_s, 1),
        "noticed_s": round(ran.noticed_s, 1), "continued_s": round(again.seconds, 1),
    }  # fmt: skip


def planned(words: str, config: RunConfig, options: Options) -> tuple[float, int]:
    """What the plan says just before the stage begins: seconds, and bytes of memory of a rank."""
    if not words.startswith("index "):
        plan = plan_step(STEPS[words], config)
        return plan.seconds or 0.0, plan.memory_bytes
    rows = Datastore.open(RunDir.of(config).datastore).rows
    factory = fit_factory(config.index.factory, options.width, rows, config.index.sample)
    rates = _rates(factory, rows, options)
    store = Store(rows, options.width, ceil(rows / config.datastore.rows_per_shard), written=True)
    cost = next(cost for cost in index_costs(factory, store, rates, options.ranks) if cost.stage == words)
    return cost.seconds, cost.memory_bytes


_MEASURED: dict[str, Rates] = {}


def _rates(factory: Factory, rows: int, options: Options) -> Rates:
    """This machine's, measured once, in a process that has the threads of a rank from its start."""
    if factory.used not in _MEASURED:
        note("measuring this machine for the plan")
        words = ["--calibrate", factory.used, options.width, rows, factory.sample, options.folder]
        threads = options.threads or share_of_cores(options.ranks)
        found = process.result(process.start(__file__, [*["--quick"] * options.quick, *words], threads))
        _MEASURED[factory.used] = Rates(**found)
    return _MEASURED[factory.used]


def rates_here(options: Options) -> dict[str, Any]:
    """In a process of `_rates`: what it measures."""
    name, width, rows, sample, folder = options.calibrate
    factory = fit_factory(name, int(width), int(rows), int(sample))
    return structs.asdict(calibrate(factory, Path(folder), amounts=FEW if options.quick else AMOUNTS))


def use_speeds(folder: Path) -> None:
    """Have the plans know of no other run: those that were loaded would correct them. The rate that they count with is
    measured here once, by a process with all threads, whatever the environment says of them, as a plan takes it."""
    path = folder / "speeds.json"
    os.environ[speeds.VARIABLE] = str(path)
    if not path.exists():
        free = {name: value for name, value in os.environ.items() if name not in process.THREADS}
        code = "from distlm.runtime.plan import machine_flops; print(machine_flops())"
        done = subprocess.run([sys.executable, "-c", code], env=free, stdout=subprocess.PIPE, text=True, check=True)
        SpeedsFile(stages=[], flops={speeds.machine(): float(done.stdout)}).write(path)


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Ends this process where the disk has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(
            f"{folder}: {what} needs {format_bytes(needed)} and the disk has {format_bytes(free)} free; free "
            f"{format_bytes(needed - free)}, or give another --folder"
        )


def files(root: Path, words: str) -> list[Path]:
    """What a stage that was run last has left; no locks."""
    places = [place for pattern in STAGES[words] for place in root.glob(pattern)]
    every = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place])]
    return sorted(path for path in every if path.is_file() and not path.name.startswith("."))


def contents(root: Path, words: str) -> dict[str, str]:
    """File → checksum of its bytes; of a record that tells of the clock without that."""
    found = {}
    for path in files(root, words):
        if words == "train" and path.name == "complete.json":
            # The checksums of the others, of which one tells of the clock.
            continue
        told = path.suffix == ".json" and words in ("train", "knn tune", "knn evaluate")
        of = json_hash(_timeless(json.loads(path.read_text("utf-8")))) if told else file_hash(path)
        found[str(path.relative_to(root))] = of
    return found


def _timeless(value: Any) -> Any:
    """Without checksums of the record and entries whose names tell of seconds."""
    if isinstance(value, dict):
        return {key: _timeless(of) for key, of in value.items() if "second" not in key and "per_s" not in key
                and key != "check"}  # fmt: skip
    return [_timeless(of) for of in value] if isinstance(value, list) else value


def clear(root: Path, words: str) -> None:
    """Remove what a stage, and none before it, has left."""
    for pattern in STAGES[words]:
        for place in root.glob(pattern):
            shutil.rmtree(place) if place.is_dir() else place.unlink()


def table(figures: Figures) -> str:
    """The figures as Markdown."""
    head = ("stage", "ranks", "planned s", "s", "planned / s", "s with start", "planned MB",
            "peak MB of each rank (own)", "written", "killed after s", "noticed in s", "continued in s",
            "same bytes")  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for words, one in figures["stages"].items():
        peaks = ", ".join(f"{peak} ({own})" for peak, own in zip(one["peak_MB"], one["own_MB"], strict=True))
        kill = ["-"] * 4
        if one.get("killed"):
            same = "yes" if one["same_bytes"] else f"NO: {', '.join(one['other_files'])}"
            kill = [one["killed_after_s"], one["noticed_s"], one["continued_s"], same]
        elif "killed" in one:
            kill[0] = "over before"
        rows.append((words, one["ranks"], one["planned_s"], one["stage_s"], one["planned_over_measured"],
                     one["seconds"], one["planned_MB"], peaks, format_bytes(one["bytes"]), *kill))  # fmt: skip
    whole = (f"{figures['rows']} rows, {format_bytes(figures['bytes'])} in all, {figures['stage_s']} s undisturbed "
             f"({figures['seconds']} s with starts), {figures['planned_s']} s planned")  # fmt: skip
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + f"\n\n{whole}\n"


if __name__ == "__main__":
    main()
