"""Peers in one table: tokens a second and perplexity of distlm beside them, on one machine in one run.

kNN evaluation beside the methods of urvashik/knnlm and knn-transformers; training steps of the AWD-LSTM at the Penn
Treebank's size beside plain torch, of a masked model beside transformers, of a transformer beside plain torch. Each
comparison is a process of its own, in which distlm and its peers take turns. It has --limit seconds; turns that were
done by then count. One that fails is left out, and does not touch the others. Of the text the beginning is taken.

    python benchmarks/peers.py --text FOLDER [--turns 3] [--only knn,lstm,plm,lm] [--out FILE.json]

--out writes a record as results/ has them. Exit code 1 where a comparison failed.
"""

import json
import sys
import tempfile
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

from peer.record import Found, record
from peer.turn import COMPARISONS, Place, Turn
from shared import process
from shared.command import Benchmark, Options, note, use_threads
from shared.text import write_beginning, write_text

from distlm.analysis.results.page import tables

WORDS = {"train": 150_000, "valid": 6_500, "test": 6_500}
"""Of each split, line ends counted."""


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, turns=1, limit=900)
    parser.add_input("--text", "folder of {train,valid,test}.txt")
    parser.add_argument("--only", default=",".join(COMPARISONS), help="comparisons, with commas between")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--limit", type=int, default=180, help="seconds after which a comparison is ended")
    parser.add_threads()
    parser.add_out()
    parser.add_argument("--worker", nargs=2, help=SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    for name in ("turns", "limit"):
        if getattr(options, name) < 1:
            parser().error(f"--{name}={getattr(options, name)}: must be 1 or more")
    options.threads = use_threads(options.threads)
    if options.worker:
        work(options)
        return
    names = chosen(options)
    with tempfile.TemporaryDirectory() as name:
        folder, given = Path(name), options.text
        try:
            options.text = (
                write_beginning(given, folder / "text", WORDS) if given else write_text(folder / "text", 1000)
            )
        except (OSError, UnicodeDecodeError) as error:
            parser().error(f"--text={given}: {error}; give a folder of train.txt, valid.txt and test.txt")
        found = []
        for one in names:
            note(f"{COMPARISONS[one]}: {options.limit} s at most")
            found.append(compare(one, options, folder / one))
            note(f"  {found[-1].why or 'done'}")
    made_of = f"the first {WORDS['train']:,} words of train" if given else "made-up text"
    settings = [f"{options.threads} thread{'s' if options.threads > 1 else ''}", made_of]
    made = record(found, command(options, given), settings, options.quick)
    print(tables(made), end="")
    if options.out:
        made.write(options.out)
    if not all(one.turns for one in found):
        sys.exit(1)


def chosen(options: Options) -> list[str]:
    """--only. Exits with 2 for a name that there is not."""
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    for name in names:
        if name not in COMPARISONS:
            parser().error(
                f"--only={options.only}: no comparison is called {name!r}; there are {', '.join(COMPARISONS)}"
            )
    return names


def compare(name: str, options: Options, folder: Path) -> Found:
    """One comparison, in a process of its own."""
    folder.mkdir()
    words = [
        *(["--quick"] if options.quick else []), "--text", options.text, "--turns", options.turns, "--threads",
        options.threads, "--worker", name, folder,
    ]  # fmt: skip
    started = process.start(__file__, words, options.threads, own_group=True)
    printed, late = process.printed_within(started, options.limit)
    if started.returncode and not late:
        # It may have found that the sides do not do the same: no turn of it says anything.
        return Found(COMPARISONS[name], [], f"exit {started.returncode}")
    # One that was ended may have begun a line.
    turns = [Turn.of(json.loads(line)) for line in printed.rpartition("\n")[0].splitlines()]
    return Found(COMPARISONS[name], turns, f"ended after {options.limit} s, turns done: {len(turns)}" if late else "")


def work(options: Options) -> None:
    """Print the turns of a comparison, a line of JSON each."""
    name, folder = options.worker
    place = Place(options.text, Path(folder), options.turns, options.threads, options.quick)
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        for turn in import_module(f"peer.{name}").turns(place):
            print(json.dumps(turn), file=out, flush=True)


def command(options: Options, text: Path | None) -> str:
    """What a user types to measure it again."""
    given = ["--quick"] if text is None else [f"--text /path/to/{text.resolve().name}"]
    plain = parser()
    given += [f"--{name} {getattr(options, name)}" for name in ("only", "turns", "limit")
              if not options.quick and getattr(options, name) != plain.get_default(name)]  # fmt: skip
    return " ".join(["python", "benchmarks/peers.py", *given])


if __name__ == "__main__":
    main()
