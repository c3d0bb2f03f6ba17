"""The command line of a benchmark: --quick beside its own options, what it reports and where to."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distlm.runtime.ranks.cores import usable_cores
from shared.machine import described

Options = argparse.Namespace
"""A command line that was read."""

NO_FIGURES = "made with --quick, which only shows that the benchmark runs: these are not figures"


class Benchmark(argparse.ArgumentParser):
    """Options are added as to any parser; `options` reads them."""

    def __init__(self, description: str | None, **quick: Any) -> None:
        """quick: what --quick sets, by the options' names; an option that is given with it counts as given."""
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self._quick = quick
        self._inputs: list[str] = []
        sizes = "".join(f" --{name.replace('_', '-')} {_shown(value)}" for name, value in quick.items())
        self.add_argument("--quick", action="store_true", help=f"only try that it runs, in seconds, with{sizes}")

    def add_input(self, flag: str, help: str) -> None:
        """A path that must be given, but for --quick, which makes something small in a temporary place."""
        self.add_argument(flag, type=Path, help=f"{help}; must be given, or --quick, which makes a small one")
        self._inputs.append(flag)

    def add_threads(self) -> None:
        """--threads; see use_threads."""
        self.add_argument("--threads", type=int, default=0, help="0: all cores")

    def add_out(self) -> None:
        """--out, for `report`."""
        self.add_argument("--out", type=Path, help="write the figures to this JSON file")

    def options(self, arguments: Sequence[str] | None = None) -> Options:
        """What `arguments` say, by default the command line's. Exits with 2 where they cannot be read."""
        words = sys.argv[1:] if arguments is None else list(arguments)
        if "--quick" in words:
            self.set_defaults(**self._quick)
        found = self.parse_args(words)
        missing = [flag for flag in self._inputs if getattr(found, flag.strip("-").replace("-", "_")) is None]
        if missing and not found.quick:
            self.error(f"{', '.join(missing)}: must be given, or --quick")
        return found


def report(figures: Mapping[str, Any], options: Options) -> None:
    """Print the figures as JSON, and write them to --out where that is given, with the machine that they are of; those
    of --quick say what they are."""
    head = {**({"note": NO_FIGURES} if options.quick else {}), "machine": described()}
    text = json.dumps({**head, **figures}, indent=1, ensure_ascii=False)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", "utf-8")


def note(text: str) -> None:
    """Say on standard error what is being done."""
    print(text, file=sys.stderr, flush=True)


def use_threads(count: int = 0) -> int:
    """Give distlm's own pools and faiss `count` threads (0: all cores that this process may use), which is returned.

    torch has a count of its own to be set.
    """
    count = count or usable_cores()
    os.environ["OMP_NUM_THREADS"] = str(count)
    return count


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
