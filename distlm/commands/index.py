"""Tools of an index: merging, extending and dropping in files of any origin, searching, tuning."""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from distlm.commands.shared import Add, Handler, config_of, one_line, print_once, refuse_ranks, require_suffix
from distlm.errors import EXIT_DONE, UsageError
from distlm.runtime.ranks.world import World, refuse_script_body


def add_verbs(add: Add) -> None:
    """index info, search, tune, extend, drop."""
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


def add_join(child: argparse.ArgumentParser, stage: Handler) -> None:
    """Arguments of `distlm index merge` for files of any origin; without them it is the `stage` of a recipe."""
    child.set_defaults(handler=partial(_index_merge, stage))
    group = child.add_argument_group("files that faiss wrote, instead of a recipe's parts")
    group.add_argument("--parts", nargs="+", default=[], metavar="FILE", help="index files of one trained index")
    group.add_argument("--out", default="", metavar="FILE", help="index file to write")
    group.add_argument("--ids", choices=("keep", "shift"), default="keep",
                       help="keep: they number the whole store (default); shift: each file numbers its own from 0, and "
                            "the files follow one another in this order")  # fmt: skip
    group.add_argument("--gaps", action="store_true", help="ids may leave numbers out")


def _index_info(options: argparse.Namespace, world: World) -> int:
    from distlm.index import index_info
    from distlm.runtime.rundir import RunDir

    return print_once(json.dumps(index_info(RunDir.of(config_of(options)).index).tree(), indent=1), world)


def _index_merge(stage: Handler, options: argparse.Namespace, world: World) -> int:
    if not options.parts and not options.out:
        return stage(options, world)
    from distlm.index.merge.join import join_indexes, plan_join
    from distlm.runtime.ranks.comm import open_comm
    from distlm.runtime.stage import set_threads
    from distlm.runtime.stop import StopFlag

    if options.words or not options.parts or not options.out:
        raise UsageError("index merge takes a recipe, or --parts FILE … and --out FILE")
    parts, out = [Path(part) for part in options.parts], Path(options.out)
    if options.dry_run:
        return print_once(plan_join(parts, out, options.ids), world)
    refuse_script_body(world)
    set_threads(0, world)
    comm = open_comm(world)
    with StopFlag() as stop:
        found = join_indexes(comm, stop, parts, out, options.ids, options.gaps)
    comm.close()
    return print_once(f"index merge: {out}: {one_line({**found.tree(), 'parts': len(found.parts)})}", world)


def _index_search(options: argparse.Namespace, world: World) -> int:
    from distlm.index.search.file import search_file
    from distlm.runtime.ranks.comm import open_comm
    from distlm.runtime.stage import set_threads

    require_suffix("--out", options.out, ".npz")
    config = config_of(options)
    refuse_script_body(world)
    set_threads(config.launch.threads, world)
    comm = open_comm(world)
    summary = search_file(config, comm, Path(options.queries), Path(options.out))
    comm.close()
    return print_once(f"index search: {one_line(summary or {})}", world)


def _index_tune(options: argparse.Namespace, world: World) -> int:
    from distlm.analysis.index_choice import tune_index
    from distlm.index.choose.measure import Budget
    from distlm.runtime.stage import set_threads

    refuse_ranks(world, "index tune", "measures one process")
    if options.queries < 1 or options.keys < 1 or not 0 <= options.least_recall <= 1:
        raise UsageError("index tune: --keys and --queries must be at least 1, --least-recall between 0 and 1")
    config = config_of(options)
    set_threads(config.launch.threads, world)
    budget = Budget(options.most_bytes, options.most_ms, options.least_recall)
    return print_once(tune_index(config, options.factories, options.keys, options.queries, budget), world)


def add_extend(child: argparse.ArgumentParser) -> None:
    """Arguments of `distlm index extend`."""
    child.add_argument("--index", required=True, metavar="FILE", help="finished index; only read")
    child.add_argument("--keys", nargs="+", default=[], metavar="FILE", help=".npy files, [n, D] float16 or float32")
    child.add_argument("--out", required=True, metavar="FILE", help="part to write")
    child.add_argument("--first-id", type=int, default=-1, help="id of the first key; default: the keys in the index")


def add_drop(child: argparse.ArgumentParser) -> None:
    """Arguments of `distlm index drop`."""
    child.add_argument("--index", required=True, metavar="FILE", help="finished index; only read")
    child.add_argument("--ids", nargs="+", default=[], metavar="LOW:HIGH", help="ids from LOW to HIGH − 1")
    child.add_argument(
        "--parts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="parts it was merged from, by path or by a name that no other has",
    )
    child.add_argument("--out", required=True, metavar="FILE", help="index to write")


def add_tune(child: argparse.ArgumentParser) -> None:
    """Arguments of `distlm index tune`."""
    child.add_argument(
        "--factories",
        nargs="+",
        default=[],
        metavar="FACTORY",
        help="default: the usual codes, the best of them with more and fewer lists",
    )
    child.add_argument(
        "--keys",
        type=int,
        default=200_000,
        help="sampled keys; a store that has more is measured on a fourth of these, too; default 200000",
    )
    child.add_argument("--queries", type=int, default=1000, help="keys that are looked for; default 1000")
    child.add_argument("--most-bytes", type=float, default=0, help="budget: bytes per key, id included")
    child.add_argument("--most-ms", type=float, default=0, help="budget: milliseconds per query of the whole store")
    child.add_argument("--least-recall", type=float, default=0, help="budget: recall in the whole store, from 0 to 1")


def run_extend(options: argparse.Namespace, world: World) -> int:
    """`distlm index extend`."""
    from distlm.index.change.extend import extend_index

    keys = [Path(path) for path in options.keys]
    return _alone(
        options, world, "extend", lambda: extend_index(Path(options.index), keys, Path(options.out), options.first_id)
    )


def run_drop(options: argparse.Namespace, world: World) -> int:
    """`distlm index drop`."""
    from distlm.index.change.drop import drop_keys

    ranges = [parse_range(text) for text in options.ids]
    return _alone(
        options, world, "drop", lambda: drop_keys(Path(options.index), ranges, options.parts, Path(options.out))
    )


def parse_range(text: str) -> tuple[int, int]:
    """LOW:HIGH as numbers. Raises UsageError."""
    low, colon, high = text.partition(":")
    if not (colon and low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise UsageError(f"--ids {text}: write LOW:HIGH, e.g. 0:1000 for the first thousand")
    return int(low), int(high)


def _alone(options: argparse.Namespace, world: World, word: str, act: Callable[[], Mapping[str, object]]) -> int:
    from distlm.runtime.stage import set_threads

    if options.words:
        raise UsageError(f"index {word} takes no recipe ({options.words[0]}); it works on files")
    refuse_ranks(world, f"index {word}", "works in one process")
    set_threads(0, world)
    found = act()
    print(f"index {word}: {options.out}: {' '.join(f'{key}={value}' for key, value in found.items())}", flush=True)
    return EXIT_DONE
