"""The `distlm` command: `distlm VERB RECIPE_OR_FILE [section.key=value ...]`, one verb per stage."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from distlm import __version__
from distlm.cli_index import add_drop, add_extend, add_tune, run_drop, run_extend
from distlm.config.check import position_warnings
from distlm.config.load import dump_config, format_help, load_config, recipe_names, split_words
from distlm.config.schema import RunConfig
from distlm.errors import EXIT_DONE, EXIT_ERROR, DistlmError, UsageError
from distlm.runtime.progress import say
from distlm.runtime.rundir import STAGE_SECTIONS
from distlm.runtime.stage import open_stage
from distlm.runtime.stop import ignore_late_signals
from distlm.runtime.world import World, refuse_script_body, resolve_world
from distlm.verbs import SHARED_VERBS, STAGE_VERBS, Verb


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits 0 done, 1 error, 2 usage, 75 stopped after a checkpoint."""
    world: World | None = None
    # torch's sockets warn of every host name that has no reverse entry.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        world = resolve_world()
        code = (_print_config if options.print_config else options.handler)(options, world)
    except DistlmError as error:
        if arguments is None:
            ignore_late_signals()
        _leave_with(error, world, ends=arguments is None)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        _leave_ranks(world, EXIT_ERROR)
    if arguments is None:
        ignore_late_signals()
        _leave_group()
    sys.exit(code)


def _leave_with(error: DistlmError, world: World | None, ends: bool) -> None:
    several = world is not None and world.size > 1
    if not (several and error.shared and world.rank != 0):  # type: ignore[union-attr]
        who = f"[rank {world.rank} on {world.node}] " if several else ""  # type: ignore[union-attr]
        print(f"{who}distlm: {error}", file=sys.stderr, flush=True)
    if error.shared:
        if ends:
            _leave_group()
        sys.exit(error.exit_code)
    _leave_ranks(world, error.exit_code)


def _leave_group() -> None:
    """Close torch's process group where a stage made one: its threads abort an interpreter that ends before them.

    Only at the end of a process: DeepSpeed keeps the first group it saw for good and fails in a second one.
    """
    if "torch.distributed" in sys.modules:
        group = sys.modules["torch.distributed"]
        if group.is_available() and group.is_initialized():
            group.destroy_process_group()


def _leave_ranks(world: World | None, code: int) -> None:
    """Exit one rank of many at once: an orderly MPI_Finalize would wait for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if world is not None and world.size > 1:
        os._exit(code)
    sys.exit(code)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="distlm",
        description="Memory-augmented language models over many nodes.",
        epilog=f"Recipes: {', '.join(recipe_names())}. `distlm config --help` lists every setting.",
    )
    parser.add_argument("--version", action="version", version=f"distlm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    groups: dict[str, Any] = {}

    def add(words: str, summary: str, handler: Callable[..., int], **defaults: Any) -> argparse.ArgumentParser:
        group, _, word = words.rpartition(" ")
        if group and group not in groups:
            above = verbs.add_parser(group, help=f"{group} …", description=f"distlm {group}")
            groups[group] = above.add_subparsers(metavar="VERB", required=True)
        place = groups[group] if group else verbs
        sections = STAGE_SECTIONS.get(defaults.get("stage", ""), ())
        child = place.add_parser(
            word,
            help=summary,
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=format_help(sections) if _wants_help(arguments) else None,
        )
        child.set_defaults(handler=handler, **defaults)
        child.add_argument("words", nargs="*", metavar="RECIPE_OR_FILE section.key=value", help="in any order")
        child.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
        return child

    for verb in STAGE_VERBS:
        child = add(verb.words, verb.summary, _run_stage, verb=verb, stage=verb.stage)
        child.add_argument("--dry-run", action="store_true", help="print the plan (work, disk, memory, time) and stop")
        if verb.words == "index merge":
            _add_join(child)
        if verb.words in ("knn search", "knn evaluate"):
            _add_no_self_test(child)
    child = add("run", "all stages of a recipe in order, finished ones skipped", _run_pipeline, stage="knn")
    child.add_argument("--dry-run", action="store_true", help="print every stage's plan and command, and stop")
    _add_no_self_test(child)
    child = add("plan", "what every stage needs on several rank counts, from rates measured here", _plan, stage="knn")
    child.add_argument("--ranks", type=int, nargs="+", default=[], help="rank counts; default: launch.ranks")
    child.add_argument("--rows", type=int, default=0, help="keys of the datastore; default: the run's")
    child.add_argument(
        "--rates", default="", metavar="FILE", help="measured rates (JSON): made, or used if it is there"
    )
    _add_reproduce(verbs, _wants_help(arguments))
    add("report", "write report.html from results.json and metrics.jsonl", _report, stage="knn")
    child = add("report-words", "change of the loss by word between two evaluations", _report_words, stage="knn")
    child.prog = "distlm report words"
    child.add_argument(
        "--before", default="lm", help="a mixture of results.json, or RUN_DIR:NAME of another run; default lm"
    )
    child.add_argument("--after", default="cache", help="the same, of the second evaluation; default cache")
    child.add_argument("--split", default="", help="default: the first of knn.splits")
    child.add_argument("--top", type=int, default=20, help="words shown on either side; default 20")
    child.add_argument("--skip", type=int, default=0, help="leave out the first tokens, e.g. those without a cache")
    child.add_argument("--out", default="", help=".csv file; default: RUN_DIR/words-SPLIT-BEFORE-AFTER.csv")
    _add_figures(verbs)
    _add_generate(add)
    add("data verify", "read every shard of token rows and compare its checksum", _data_verify, stage="shard")
    add("datastore verify", "read every shard and compare its checksum", _datastore_verify, stage="datastore")
    add("datastore info", "what the datastore holds", _datastore_info, stage="datastore")
    child = add("datastore import-memmap", "the original's PREFIX_keys.npy and PREFIX_vals.npy become the datastore",
                _datastore_memmap, stage="datastore", into="import")  # fmt: skip
    child.add_argument("--prefix", required=True, help="what comes before _keys.npy and _vals.npy")
    child = add("datastore export-memmap", "the datastore as the original's PREFIX_keys.npy and PREFIX_vals.npy",
                _datastore_memmap, stage="datastore", into="export")  # fmt: skip
    child.add_argument("--prefix", required=True, help="what comes before _keys.npy and _vals.npy")
    child.add_argument("--keys", choices=("float16", "float32"), default="", help="default: as they are stored")
    child.add_argument("--values", choices=("int64", "int32", "int16"), default="int64", help="default int64")
    add("index info", "what the index holds", _index_info, stage="index")
    child = add(
        "index search",
        "neighbours of query vectors in a .npy file; on several ranks each searches its parts",
        _index_search,
        stage="knn",
    )
    child.add_argument("--queries", required=True, help=".npy file, [Q, D] float16 or float32")
    child.add_argument("--out", required=True, help=".npz file to write: ids, distances, values [Q, k]")
    add_tune(add("index tune", "measure factories on a sample of the store and pick one", _index_tune, stage="knn"))
    add_extend(add("index extend", "new keys for a finished index, as a part that merges with it", run_extend))
    add_drop(add("index drop", "an index without some keys; the others keep their ids", run_drop))
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
    add("config", "print the resolved configuration", _print_config)
    child = add("doctor", "check this machine and environment", _doctor)
    child.add_argument("--json", action="store_true", help="machine-readable output")
    child.add_argument("--cluster", action="store_true", help="check all ranks of this start together, e.g. under srun")
    child.add_argument("--folder", default=".", help="with --cluster: where runs will live; default: this folder")

    # `report` takes a recipe, so that argparse cannot give it a verb below it.
    if arguments[:1] == ["report"] and arguments[1:2] and arguments[1] in ("words", "frequency", "clusters"):
        arguments = [f"report-{arguments[1]}", *arguments[2:]]
    # The deepspeed launcher appends --local_rank=K; the World reads the rank from the environment.
    known, extras = parser.parse_known_args([a for a in arguments if not a.startswith("--local_rank=")])
    for extra in extras:
        if "=" not in extra:
            raise UsageError(f"unknown argument {extra!r}; settings are given as section.key=value")
    known.words = [*known.words, *extras]
    return known


def _add_no_self_test(child: argparse.ArgumentParser) -> None:
    child.add_argument("--no-self-test", action="store_true", help="knn.self_test=false; the results will say so")


def _add_generate(add: Callable[..., argparse.ArgumentParser]) -> None:
    child = add("generate", "continue a prompt without and with neighbours, and show them", _generate, stage="knn")
    child.add_argument("--prompt", default="", help="words between spaces, as in the text; default: none")
    child.add_argument("--tokens", type=int, default=40, help="words to generate; default 40")
    child.add_argument("--greedy", action="store_true", help="take the most probable word instead of drawing one")
    child.add_argument("--seed", type=int, default=1, help="of the draws; default 1")
    child.add_argument("--top-p", type=float, default=1.0, help="draw among the most probable words with this share")
    child.add_argument("--neighbours", type=int, default=5, help="shown behind each word; default 5")
    child.add_argument("--context", type=int, default=10, help="words shown of a neighbour's context; default 10")
    child.add_argument("--lm-only", action="store_true", help="no neighbours: needs neither datastore nor index")
    child.add_argument("--html", default="", metavar="FILE", help="also write a page with the neighbours of each word")


def _add_join(child: argparse.ArgumentParser) -> None:
    child.set_defaults(handler=_index_merge)
    group = child.add_argument_group("files that faiss wrote, instead of a recipe's parts")
    group.add_argument("--parts", nargs="+", default=[], metavar="FILE", help="index files of one trained index")
    group.add_argument("--out", default="", metavar="FILE", help="index file to write")
    group.add_argument("--ids", choices=("keep", "shift"), default="keep",
                       help="keep: they number the whole store (default); shift: each file numbers its own from 0, and "
                            "the files follow one another in this order")  # fmt: skip
    group.add_argument("--gaps", action="store_true", help="ids may leave numbers out")


def _add_figures(verbs: Any) -> None:
    """Figures of Ton et al. over any runs: they take run directories and no recipe."""
    for name, summary, handler in (
        ("frequency", "loss by word frequency, of the LM and the kNN-LM of any runs", _report_frequency),
        ("clusters", "likelihood of frequent words' states under a Gaussian mixture, by loss", _report_clusters),
    ):
        child = verbs.add_parser(f"report-{name}", prog=f"distlm report {name}", help=summary, description=summary)
        child.set_defaults(handler=handler, print_config=False)
        child.add_argument("words", nargs="+", metavar="RUN_DIR[:NAME]", help="NAME: lm, cache, knn or both")
        child.add_argument("--split", default="valid", help="an evaluated split; default valid")
        child.add_argument("--out", default="", help=f".png file; default: RUN_DIR/{name}-SPLIT.png of the first run")
    child.add_argument("--words", type=int, default=20, dest="count", help="so many frequent words; default 20")
    child.add_argument("--rows", type=int, default=20000, help="keys that the mixture is fitted to; default 20000")
    child.add_argument("--components", type=int, default=10, help="Gaussians m; default 10, the paper's")
    child.add_argument("--covariance", choices=("diag", "full"), default="diag", help="of each; default diag")
    child.add_argument(
        "--threshold", type=float, help="nats that part high from low losses; default: the first run's median"
    )
    child.add_argument("--seed", type=int, default=1, help="of the sample and the fit; default 1")


def _add_reproduce(verbs: Any, help_wanted: bool) -> None:
    from distlm.reproduce.experiment import experiment_help

    summary = "all runs of a paper's table, each resumable, then the table"
    child = verbs.add_parser(
        "reproduce", help=summary, description=summary, epilog=experiment_help() if help_wanted else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    child.set_defaults(handler=_reproduce, print_config=False)
    child.add_argument("words", nargs="+", metavar="EXPERIMENT INPUT=FOLDER section.key=value",
                       help="settings are those of every run")  # fmt: skip
    child.add_argument("--scale", default="small", help="small (default; CPU cores), paper, or another that it has")
    child.add_argument("--into", default="", help="folder of the runs; default: runs/EXPERIMENT")
    child.add_argument("--only", default="", help="these runs and what they need, separated by commas")
    child.add_argument("--at-once", type=int, default=1, help="runs that go on at the same time; default 1")
    child.add_argument("--dry-run", action="store_true", help="print every command, and stop")
    child.add_argument("--tables", action="store_true", help="only write the tables of what is finished")


def _reproduce(options: argparse.Namespace, world: World) -> int:
    from distlm.reproduce.experiment import load_experiment
    from distlm.reproduce.run import plan_experiment, run_experiment, write_tables

    if world.size > 1:
        raise UsageError(f"`distlm reproduce` starts the ranks itself; start it once, not on {world.size} ranks")
    names = [word for word in options.words if "=" not in word]
    if len(names) != 1:
        raise UsageError(f"expected one experiment, found {', '.join(names) or 'none'}; see distlm reproduce --help")
    given = [word.partition("=") for word in options.words if "=" in word]
    inputs = {key: value for key, _, value in given if "." not in key}
    overrides = [f"{key}={value}" for key, _, value in given if "." in key]
    root = Path(options.into or f"runs/{names[0]}").absolute()
    only = options.only.split(",") if options.only else []
    experiment = load_experiment(names[0], root, inputs, overrides, only, options.scale)
    if options.dry_run:
        return _print(plan_experiment(experiment), world)
    if options.tables:
        return _print(write_tables(experiment), world)
    if options.at_once < 1:
        raise UsageError(f"--at-once {options.at_once}: must be at least 1")
    return run_experiment(experiment, options.at_once)


def _wants_help(arguments: Sequence[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _config(options: argparse.Namespace) -> RunConfig:
    options.recipe, options.overrides = split_words(options.words)
    if getattr(options, "no_self_test", False):
        options.overrides.append("knn.self_test=false")
    return load_config(options.recipe, options.overrides)


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _run_stage(options: argparse.Namespace, world: World) -> int:
    verb: Verb = options.verb
    config = _config(options)
    if options.dry_run:
        return _print(_load(verb.plan)(config, config.launch.ranks if world.size == 1 else world.size).line(), world)
    if verb.ranks:
        refuse_script_body(world)
    if config.launch.share and verb.words not in SHARED_VERBS:
        raise UsageError(
            f"launch.share={config.launch.share}: `distlm {verb.words}` has no shares; "
            f"only {' and '.join(SHARED_VERBS)} do"
        )
    if verb.stage in ("datastore", "knn"):
        _warn(config, world)
    with open_stage(verb.stage, config, world) as stage:
        summary = _load(verb.function)(stage)
    if world.rank == 0:
        print(f"{verb.words}: {_one_line(summary)}", flush=True)
    return EXIT_DONE


def _run_pipeline(options: argparse.Namespace, world: World) -> int:
    config = _config(options)
    from distlm.pipeline import plan_pipeline, run_pipeline

    if world.size > 1:
        raise UsageError(f"`distlm run` starts the ranks itself; start it once, not on {world.size} ranks")
    _warn(config, world)
    if options.dry_run:
        return _print(plan_pipeline(config, options.recipe, options.overrides), world)
    return run_pipeline(config, options.recipe, options.overrides)


def _plan(options: argparse.Namespace, world: World) -> int:
    from distlm.plan_sheet import plan_sheet
    from distlm.runtime.stage import set_threads

    if world.size > 1:
        raise UsageError(f"`distlm plan` measures one process; start it once, not on {world.size} ranks")
    config = _config(options)
    set_threads(config.launch.threads, world)
    rates = Path(options.rates) if options.rates else None
    return _print(plan_sheet(config, options.ranks or [config.launch.ranks], options.rows, rates), world)


def _report(options: argparse.Namespace, world: World) -> int:
    config = _config(options)
    from distlm.analysis.report import write_report
    from distlm.runtime.rundir import RunDir

    return _print(f"wrote {write_report(RunDir(Path(config.run_dir)))}", world)


def _report_words(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.words import open_evaluation, word_changes, words_table, write_csv
    from distlm.runtime.rundir import RunDir

    config = _config(options)
    run, split = RunDir(Path(config.run_dir)), options.split or config.knn.splits[0]
    before, after = (open_evaluation(text, run, split) for text in (options.before, options.after))
    rows = word_changes(before, after, options.skip)
    names = "-".join(Path(text.replace(":", "/")).name for text in (options.before, options.after))
    out = Path(options.out) if options.out else run.root / f"words-{split}-{names}.csv"
    write_csv(rows, out)
    table = words_table(rows, options.top, f"{split}, {options.before} → {options.after}")
    return _print(f"{table}\n\nall {len(rows)} words: {out}", world)


def _report_frequency(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.frequency import report_frequency

    return _print(report_frequency(options.words, options.split, _picture(options.out)), world)


def _report_clusters(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.clusters import Settings, report_clusters

    settings = Settings(
        options.count, options.rows, options.components, options.covariance, options.threshold, options.seed
    )
    return _print(report_clusters(options.words, options.split, settings, _picture(options.out)), world)


def _picture(out: str) -> Path | None:
    if out and not out.endswith(".png"):
        raise UsageError(f"--out {out}: must end in .png; the data goes beside it")
    return Path(out) if out else None


def _generate(options: argparse.Namespace, world: World) -> int:
    from distlm.knnlm.generate import Sampling
    from distlm.knnlm.generate_run import generation_text, run_generate

    if world.size > 1:
        raise UsageError(f"`distlm generate` is for one process, not {world.size} ranks")
    sampling = Sampling(
        options.tokens, options.greedy, options.seed, options.top_p, options.neighbours, options.context
    )  # fmt: skip
    with open_stage("knn", _config(options), world) as stage:
        made = run_generate(stage, options.prompt, sampling, options.lm_only)
    if options.html:
        from distlm.analysis.generation import write_page

        write_page(made, Path(options.html))
        say(f"wrote {options.html}")
    return _print(generation_text(made), world)


def _data_verify(options: argparse.Namespace, world: World) -> int:
    from distlm.data.shard_reader import verify_shards
    from distlm.runtime.rundir import RunDir

    config = _config(options)
    folder = RunDir(Path(config.run_dir)).shards(config)
    return _verified(folder, verify_shards(folder), world)


def _datastore_verify(options: argparse.Namespace, world: World) -> int:
    from distlm.datastore.verify import verify_datastore
    from distlm.runtime.rundir import RunDir

    folder = RunDir(Path(_config(options).run_dir)).datastore
    return _verified(folder, verify_datastore(folder), world)


def _verified(folder: Path, problems: Sequence[str], world: World) -> int:
    for problem in problems:
        print(f"FAIL {problem}", file=sys.stderr)
    _print(f"{folder}: {'whole' if not problems else f'{len(problems)} problems'}", world)
    return EXIT_ERROR if problems else EXIT_DONE


def _datastore_info(options: argparse.Namespace, world: World) -> int:
    from distlm.datastore.verify import datastore_info
    from distlm.runtime.rundir import RunDir

    return _print(json.dumps(datastore_info(RunDir(Path(_config(options).run_dir)).datastore), indent=1), world)


def _datastore_memmap(options: argparse.Namespace, world: World) -> int:
    from distlm.datastore.memmap import export_memmap, import_memmap

    config = _config(options)
    refuse_script_body(world)
    if config.launch.share and options.into == "export":
        raise UsageError(f"launch.share={config.launch.share}: `distlm datastore export-memmap` has no shares")
    with open_stage("datastore", config, world) as stage:
        if options.into == "import":
            found = import_memmap(stage, options.prefix)
        else:
            found = export_memmap(stage, options.prefix, options.keys, options.values)
    return _print(f"datastore {options.into}-memmap: {_one_line(found)}", world)


def _index_info(options: argparse.Namespace, world: World) -> int:
    from distlm.index import index_info
    from distlm.runtime.rundir import RunDir

    return _print(json.dumps(index_info(RunDir(Path(_config(options).run_dir)).index), indent=1), world)


def _index_merge(options: argparse.Namespace, world: World) -> int:
    if not options.parts and not options.out:
        return _run_stage(options, world)
    from distlm.index.join import join_indexes, plan_join
    from distlm.runtime.comm import open_comm
    from distlm.runtime.stage import set_threads
    from distlm.runtime.stop import StopFlag

    if options.words or not options.parts or not options.out:
        raise UsageError("index merge takes a recipe, or --parts FILE … and --out FILE")
    parts, out = [Path(part) for part in options.parts], Path(options.out)
    if options.dry_run:
        return _print(plan_join(parts, out, options.ids), world)
    refuse_script_body(world)
    set_threads(0, world)
    comm = open_comm(world)
    with StopFlag() as stop:
        found = join_indexes(comm, stop, parts, out, options.ids, options.gaps)
    comm.close()
    return _print(f"index merge: {out}: {_one_line(found)}", world)


def _index_search(options: argparse.Namespace, world: World) -> int:
    from distlm.index.search_file import search_file
    from distlm.runtime.comm import open_comm
    from distlm.runtime.stage import set_threads

    config = _config(options)
    refuse_script_body(world)
    set_threads(config.launch.threads, world)
    comm = open_comm(world)
    summary = search_file(config, comm, Path(options.queries), Path(options.out))
    comm.close()
    return _print(f"index search: {_one_line(summary or {})}", world)


def _index_tune(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.index_choice import tune_index
    from distlm.index.choose import Budget
    from distlm.runtime.stage import set_threads

    if world.size > 1:
        raise UsageError(f"`distlm index tune` measures one process; start it once, not on {world.size} ranks")
    if options.queries < 1 or options.keys < 1 or not 0 <= options.least_recall <= 1:
        raise UsageError("index tune: --keys and --queries must be at least 1, --least-recall between 0 and 1")
    config = _config(options)
    set_threads(config.launch.threads, world)
    budget = Budget(options.most_bytes, options.most_ms, options.least_recall)
    return _print(tune_index(config, options.factories, options.keys, options.queries, budget), world)


def _import_lstm(options: argparse.Namespace, world: World) -> int:
    from distlm.training.import_lstm import import_awd_lstm

    config = _config(options)
    words = Path(options.vocabulary) if options.vocabulary else None
    return _print(f"import awd-lstm: {_one_line(import_awd_lstm(config, Path(options.weights), words))}", world)


def _import_fairseq(options: argparse.Namespace, world: World) -> int:
    from distlm.training.import_fairseq import import_fairseq

    found = import_fairseq(_config(options), Path(options.weights), Path(options.dictionary))
    return _print(f"import fairseq: {_one_line(found)}", world)


def _import_hf(options: argparse.Namespace, world: World) -> int:
    from distlm.training.hf_job import import_hf

    return _print(f"import hf: {_one_line(import_hf(_config(options)))}", world)


def _export_hf(options: argparse.Namespace, world: World) -> int:
    from distlm.models.plm_export import save_pretrained
    from distlm.models.plm_io import load_plm
    from distlm.runtime.rundir import RunDir

    config = _config(options)
    run, out = RunDir(Path(config.run_dir)), Path(options.out)
    checkpoint = run.newest_checkpoint()
    tokenizer = run.shards(config) / "tokenizer"
    save_pretrained(load_plm(checkpoint)[0], out, tokenizer if tokenizer.is_dir() else None)
    return _print(f"export hf: {checkpoint} as {out}", world)


def _memory_bench(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.tables import markdown
    from distlm.models.device import default_device
    from distlm.training.memory_bench import bench_table, run_bench

    for name in ("tokens", "turns"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: must be at least 1")
    config = _config(options)
    if options.tokens > config.plm.max_positions:
        raise UsageError(
            f"--tokens {options.tokens}: the model takes at most plm.max_positions={config.plm.max_positions}"
        )
    found = run_bench(config, options.tokens, options.turns, options.train_rows, default_device())
    return _print(markdown(*bench_table(found)), world)


def _print_config(options: argparse.Namespace, world: World) -> int:
    return _print(dump_config(_config(options)), world)


def _doctor(options: argparse.Namespace, world: World) -> int:
    from distlm.runtime.doctor import render, report

    if options.cluster:
        from distlm.runtime.cluster_check import cluster_checks

        refuse_script_body(world)
        text, healthy = render(cluster_checks(world, Path(options.folder).absolute()), as_json=options.json)
    else:
        text, healthy = report(world, as_json=options.json)
    _print(text, world)
    return EXIT_DONE if healthy else EXIT_ERROR


def _warn(config: RunConfig, world: World) -> None:
    for warning in position_warnings(config):
        say(warning, world.rank)


def _print(text: str, world: World) -> int:
    if world.rank == 0:
        print(text.rstrip("\n"), flush=True)
    return EXIT_DONE


def _one_line(summary: dict[str, Any]) -> str:
    def show(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    return " ".join(f"{key}={show(value)}" for key, value in summary.items() if not isinstance(value, dict | list))
