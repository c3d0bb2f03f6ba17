"""The rarer verbs of an index: extend and drop, for files of any origin, and the arguments of tune."""

import argparse
from collections.abc import Callable
from pathlib import Path

from distlm.errors import EXIT_DONE, UsageError
from distlm.runtime.world import World


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
    child.add_argument("--parts", nargs="+", default=[], metavar="NAME", help="parts it was merged from")
    child.add_argument("--out", required=True, metavar="FILE", help="index to write")


def add_tune(child: argparse.ArgumentParser) -> None:
    """Arguments of `distlm index tune`."""
    child.add_argument("--factories", nargs="+", default=[], metavar="FACTORY", help="default: the usual ones")
    child.add_argument("--keys", type=int, default=200_000, help="sampled keys; default 200000")
    child.add_argument("--queries", type=int, default=1000, help="keys that are looked for; default 1000")
    child.add_argument("--most-bytes", type=float, default=0, help="budget: bytes per key, id included")
    child.add_argument("--most-ms", type=float, default=0, help="budget: milliseconds per query")
    child.add_argument("--least-recall", type=float, default=0, help="budget: recall, from 0 to 1")


def run_extend(options: argparse.Namespace, world: World) -> int:
    """`distlm index extend`."""
    from distlm.index.extend import extend_index

    keys = [Path(path) for path in options.keys]
    return _alone(
        options, world, "extend", lambda: extend_index(Path(options.index), keys, Path(options.out), options.first_id)
    )


def run_drop(options: argparse.Namespace, world: World) -> int:
    """`distlm index drop`."""
    from distlm.index.drop import drop_keys

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


def _alone(options: argparse.Namespace, world: World, word: str, act: Callable[[], dict[str, object]]) -> int:
    from distlm.runtime.stage import set_threads

    if options.words:
        raise UsageError(f"index {word} takes no recipe ({options.words[0]}); it works on files")
    if world.size > 1:
        raise UsageError(f"`distlm index {word}` works in one process; start it once, not on {world.size} ranks")
    set_threads(0, world)
    found = act()
    print(f"index {word}: {options.out}: {' '.join(f'{key}={value}' for key, value in found.items())}", flush=True)
    return EXIT_DONE
