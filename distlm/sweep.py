"""`distlm sweep`: the same store asked every combination of some settings; what is answered is not asked again."""

import itertools
import re
from collections.abc import Iterator, Sequence

from distlm.analysis.questions import write_answers
from distlm.analysis.report import write_report
from distlm.config.load import leaf_fields, load_config, parse_overrides
from distlm.config.schema import RunConfig
from distlm.errors import EXIT_DONE, UsageError
from distlm.pipeline import check_settings, run_stages
from distlm.runtime.child import until_told_twice
from distlm.runtime.progress import say
from distlm.runtime.rundir import RunDir

_BEFORE_LISTS = re.compile(r"(OPQ|PCAR?|PCAW|ITQ|RR|L2norm|Pad)")
"""Transforms that stand before the inverted lists of a faiss factory."""


def split_factories(text: str) -> list[str]:
    """faiss factories with commas between them, whose own parts have commas between them, too.

    A factory begins at a part that can only be the first one: its lists (IVF…), or a transform after lists were named.
    """
    found: list[list[str]] = [[]]
    for part in text.split(","):
        listed = any(word.startswith("IVF") for word in found[-1])
        if listed and (part.startswith("IVF") or _BEFORE_LISTS.match(part)):
            found.append([])
        found[-1].append(part)
    return [",".join(parts) for parts in found]


def grid_of(overrides: Sequence[str], cls: type[RunConfig]) -> tuple[list[str], dict[str, list[str]]]:
    """Settings with one value, and the swept ones with their values in order.

    Raises UsageError where nothing is swept, or a swept setting has no files of its own in a run directory.
    """
    asked = {key for key, item in leaf_fields(cls).items() if item.metadata.get("question")}
    fixed, swept = [], {}
    for key, value in parse_overrides(overrides).items():
        values = split_factories(value) if key == "index.factory" else value.split(",")
        if len(values) == 1 or value.startswith("["):
            fixed.append(f"{key}={value}")
        elif key not in asked:
            raise UsageError(f"{key}={value}: cannot be swept; what a store can be asked: {', '.join(sorted(asked))}")
        else:
            swept[key] = list(dict.fromkeys(values))
    if not swept:
        raise UsageError("sweep: give at least one setting several values, e.g. knn.nprobe=1,8,32")
    return fixed, swept


def questions(swept: dict[str, list[str]]) -> Iterator[list[str]]:
    """Every combination as overrides; of questions that differ in k alone the largest k first, which answers all."""
    if "knn.k" in swept:
        others = {key: values for key, values in swept.items() if key != "knn.k"}
        try:
            ks = sorted(map(int, swept["knn.k"]), reverse=True)
        except ValueError as error:
            raise UsageError(f"knn.k={','.join(swept['knn.k'])}: must be whole numbers ({error})") from error
        swept = {**others, "knn.k": [str(k) for k in ks]}
    for values in itertools.product(*swept.values()):
        yield [f"{key}={value}" for key, value in zip(swept, values, strict=True)]


def run_sweep(recipe: str, overrides: Sequence[str], dry_run: bool = False) -> int:
    """Ask every question whose answer is missing, and print the table of all; an exit code.

    All configurations are checked before anything is run. Raises UsageError as `grid_of`, and what run_stages does;
    a stop signal ends the sweep with 75, and the same command continues it.
    """
    first = load_config(recipe)
    fixed, swept = grid_of(overrides, type(first))
    asked = []
    for own in questions(swept):
        given = [*fixed, *own]
        asked.append((given, load_config(recipe, given)))
    for _, config in asked:
        check_settings(config)
    with until_told_twice() as stop:
        for number, (given, config) in enumerate(asked, 1):
            say(f"sweep [{number}/{len(asked)}] {' '.join(given[len(fixed) :])}: {RunDir.of(config).label}")
            if dry_run:
                continue
            code = run_stages(config, recipe, given, stop)
            if code != EXIT_DONE:
                return code
        if not dry_run:
            run = RunDir.of(asked[-1][1])
            print(f"\n{write_answers(run)}\n\n{run.root}/questions.{{md,csv}}; report: {write_report(run)}", flush=True)
    return EXIT_DONE
