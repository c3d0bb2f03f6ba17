"""`distlm plan`: what every stage of a recipe needs on several rank counts, before any job is queued."""

import dataclasses
import json
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from msgspec import structs

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, UsageError
from distlm.index.choose.auto import said
from distlm.index.choose.calibrate import calibrate
from distlm.index.choose.cost import Cost, index_costs
from distlm.index.choose.plan import Store, add_units, copied, fitted, store_of
from distlm.index.records import Rates, RatesFile
from distlm.models.described import causal, model_of
from distlm.pipeline import Step, plan_or_finished, steps_of
from distlm.runtime.files import format_bytes
from distlm.runtime.progress import format_seconds, say
from distlm.runtime.ranks.cores import usable_cores
from distlm.runtime.rundir import RunDir
from distlm.runtime.units.planned import efficiency

_HEAD = ("stage", "ranks", "disk", "memory/rank", "read", "written", "network", "time", "must read")
_BUSY_RANKS = [2**power for power in range(11)]


def plan_sheet(config: RunConfig, ranks: Sequence[int], rows: int, rates: Path | None) -> str:
    """A table of the index stages from measured rates, a line for every other stage, and how busy ranks will be.

    rows: keys of the datastore; 0: those of the run. rates: a file of an earlier measurement; it is made when it is not
    there. Raises DistlmError for a file of another factory or width.
    """
    if min(ranks, default=0) < 1:
        raise UsageError(f"--ranks {' '.join(map(str, ranks))}: must be at least 1")
    lines, cores = [], usable_cores()
    if max(ranks) > cores and not config.launch.threads:
        lines.append(f"more ranks than the {cores} cores here: each is taken to have a machine like this one")
    busy: list[Busy] = []
    for step in steps_of(config):
        if step.words == "index build":
            lines += _index_lines(config, ranks, rows, rates, busy)
        else:
            busy += _busy(step, _with_ranks(config, 1))
            every = [_line(step, _with_ranks(config, count)) for count in (ranks if step.parallel else [1])]
            lines += dict.fromkeys(every)
    return "\n".join([*lines, *_busy_lines(busy)])


@dataclasses.dataclass(frozen=True)
class Busy:
    """What keeps the ranks of a stage busy."""

    stage: str
    phases: Sequence[int]
    """Units of work of each phase."""
    seconds: float
    """Of one rank."""


def _busy(step: Step, config: RunConfig) -> list[Busy]:
    try:
        plan = plan_or_finished(step, config, RunDir.of(config))
    except DistlmError:
        return []
    return [Busy(step.words, plan.units, plan.seconds or 0.0)] if plan.units else []


def _busy_lines(stages: Sequence[Busy]) -> list[str]:
    """A table: share of the ranks' time that is work, at 1 to 1,024 ranks, of each stage and of all by their time."""
    if not stages:
        return []
    rows = [("", "units", *map(str, _BUSY_RANKS))]
    for one in stages:
        shares = [efficiency(one.phases, ranks) for ranks in _BUSY_RANKS]
        rows.append((one.stage, "+".join(map(str, one.phases)), *(f"{share:.3f}" for share in shares)))
    whole = sum(one.seconds for one in stages)
    if whole and len(stages) > 1:
        taken = [sum(one.seconds / efficiency(one.phases, ranks) for one in stages) for ranks in _BUSY_RANKS]
        rows.append(("together", "", *(f"{whole / seconds:.3f}" for seconds in taken)))
    return ["share of the ranks' time that is work, by ranks:", *_aligned(rows)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _line(step: Step, config: RunConfig) -> str:
    try:
        plan = plan_or_finished(step, config, RunDir.of(config))
    except DistlmError as error:
        # A recipe is planned before its text is there.
        return f"{step.words:<16} not known yet: {error}"
    count = config.launch.ranks
    return dataclasses.replace(plan, work=f"{count} ranks: {plan.work}" if step.parallel else plan.work).line()


def _with_ranks(config: RunConfig, ranks: int) -> RunConfig:
    return dataclasses.replace(config, launch=dataclasses.replace(config.launch, ranks=ranks))


def _index_lines(config: RunConfig, ranks: Sequence[int], rows: int, rates: Path | None, busy: list[Busy]) -> list[str]:
    """Lines of the index stages; what keeps ranks busy is added to `busy`."""
    store = _store(config, rows)
    if store is None:
        return ["index build      the number of keys is not known yet: give --rows, or run `distlm data prepare`"]
    chosen, factory = fitted(config, store.rows, store.width)
    if rates is not None and rates.exists():
        found = RatesFile.read(rates)
        if (found.factory, found.width, found.sample) != (factory.used, store.width, factory.sample):
            raise DistlmError(
                f"{rates}: measured for {found.factory}, width {found.width}, sample {found.sample}, wanted "
                f"{factory.used}, width {store.width}, sample {factory.sample}; remove it to measure again"
            )
        measured = found.rates
    else:
        say(f"plan: measuring this machine for {factory.used} of {store.width} values, about a minute")
        folder = Path(config.run_dir)
        while not folder.is_dir():
            folder = folder.parent
        measured = calibrate(factory, folder, lambda what: say(f"plan: measuring {what}"))
        if rates is not None:
            of = RatesFile(factory=factory.used, width=store.width, sample=factory.sample, rates=measured)
            of.write(rates)
    table: list[tuple[str, ...]] = [_HEAD]
    for count in ranks:
        table += [_row(cost, count) for cost in index_costs(factory, store, measured, count)]
    alone = index_costs(factory, store, measured, 1)[1]
    busy.append(Busy(alone.stage, [add_units(factory, store)], alone.seconds))
    return [
        *said(chosen),
        *factory.messages,
        *copied(config, store),
        f"index: {store.rows} keys × {store.width}, {factory.used}, {factory.key_bytes} bytes/key, {store.shards} "
        f"shards; measured: {_rates_line(measured)}",
        *_aligned(table),
    ]


def _store(config: RunConfig, rows: int) -> Store | None:
    if not rows:
        return store_of(config)
    shards = ceil(rows / config.datastore.rows_per_shard)
    return Store(rows, causal(model_of(config)).width, shards, written=False, item=config.datastore.key_item)


def _row(cost: Cost, ranks: int) -> tuple[str, ...]:
    must = f"{format_bytes(cost.read_rate)}/s" if cost.read_rate else "-"
    sizes = (cost.disk_bytes, cost.memory_bytes, cost.read_bytes, cost.written_bytes, cost.network_bytes)
    return (cost.stage, str(ranks), *map(format_bytes, sizes), format_seconds(cost.seconds), must)


def _rates_line(rates: Rates) -> str:
    shown = json.dumps({name: float(f"{value:.3g}") for name, value in structs.asdict(rates).items()
                        if value})  # fmt: skip
    return shown.strip("{}").replace('"', "")
