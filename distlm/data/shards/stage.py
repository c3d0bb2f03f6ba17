"""The stage `distlm data shard`: documents → WordPiece → tar shards of packed rows.

1. Scan: each source is read once, for its hash and for the places at which it can be cut between documents. The plan
   follows: which text goes into which shard. A pure function of the text and shards.shard_text.
2. Vocabulary: given, or trained on rank 0.
3. Units: of the shards left, rank r of R writes the r-th of every R. Rows are packed within a shard, so a shard needs
   nothing of the others, and 1, 2 or 32 ranks write the same bytes.
4. The manifest, last.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from math import ceil
from pathlib import Path

from distlm.data.documents import PIECE
from distlm.data.shards.config import ShardsConfig
from distlm.data.shards.estimate import plan_shard
from distlm.data.shards.files import (
    MANIFEST,
    PLAN,
    SHARD_NAME,
    TOKENIZER_FOLDER,
    Shard,
    ShardsManifest,
    ShardsPlan,
    Unit,
    belonging,
    id_dtype,
    marker_path,
    plan_units,
    read_marker,
    write_marker,
)
from distlm.data.shards.reader import written_shards
from distlm.data.shards.records import ShardSettings
from distlm.data.shards.settings import finished_shards, refuse_other_settings, refuse_other_text, shard_settings
from distlm.data.shards.wordpiece import SPECIALS, VOCABULARY, Encoder, WordPiece, train_wordpiece
from distlm.data.shards.writer import UnitReader, write_shard
from distlm.data.text.check import spelled_note
from distlm.data.text.choice import choice_of_shards
from distlm.data.text.opened import open_sources, segments_of
from distlm.data.text.source import Cutting, Scan, Source
from distlm.errors import DistlmError, Stopped
from distlm.runtime.files import format_bytes, require_free_disk, sweep_temporaries
from distlm.runtime.lock import only_writer
from distlm.runtime.metrics import STAGE_SECONDS, TOKENS_PER_S
from distlm.runtime.progress import Progress, say
from distlm.runtime.ranks.collective import rank0_first, together
from distlm.runtime.stage import Stage

__all__ = ["finished_shards", "plan_shard", "run_shard"]

_LABEL = "data shard"
Sources = dict[str, list[Source]]
ShardSummary = dict[str, str | bool | int | float]
"""What the stage prints: folder, already, vocabulary, shards, SPLIT_rows, SPLIT_tokens, seconds, tokens_per_s."""


def run_shard(stage: Stage) -> ShardSummary:
    """Make the shards; whole shards of an earlier start are kept.

    Returns folder, already (nothing was done), vocabulary, shards, rows and tokens of each split, and of this start
    seconds and tokens_per_s.
    Raises DistlmError on every rank for bad text, vocabulary or settings, for a folder with shards of other settings
    or with foreign files, for a full disk. Raises Stopped at a shard boundary after a stop signal.
    """
    start, comm, config = time.monotonic(), stage.comm, stage.config.section(ShardsConfig)
    folder = stage.run.shards(stage.config)
    # First without the lock: a finished folder may be read-only.
    manifest = rank0_first(comm, lambda: finished_shards(folder, config))
    if manifest is not None:
        stage.require_whole(folder, rank0_first(comm, lambda: written_shards(folder)))
        if comm.rank == 0:
            _tidy(folder, manifest.plan)
        say(f"{_LABEL}: {folder} is complete with the same settings; nothing to do", comm.rank)
        return _summary(folder, manifest, already=True)
    rank0_first(comm, lambda: _refuse_foreign(folder))
    with only_writer(folder, comm, "making these shards"):
        # Another run may have finished it in the meantime.
        manifest = rank0_first(comm, lambda: finished_shards(folder, config))
        if manifest is not None:
            return _summary(folder, manifest, already=True)
        settings = together(comm, lambda: shard_settings(config))
        plan = rank0_first(comm, lambda: _begun_plan(folder, config, settings))
        if config.source == "hub":
            # Fetched once, then opened by all.
            rank0_first(comm, lambda: len(_sources(config)))
        sources = together(comm, lambda: _sources(config))
        if plan is None:
            plan = _make_plan(stage, folder, settings, sources)
        wordpiece = rank0_first(comm, lambda: _vocabulary(stage, folder, plan, sources))
        whole = rank0_first(comm, lambda: _keep_whole(folder, plan, sources, wordpiece))
        left = [unit for unit in plan.all_units if unit.name not in whole]
        told = comm.gather(_write_units(stage, folder, plan, sources, wordpiece, left))
        # Told, not read back from the markers: a network file system may show other nodes' files late.
        manifest = rank0_first(comm, lambda: _finish(folder, plan, wordpiece, whole, told or []))
    seconds = time.monotonic() - start
    written = {unit.name for unit in left}
    tokens = sum(shard.tokens for shards in manifest.shards.values() for shard in shards if shard.name in written)
    if comm.rank == 0 and left:
        values = {STAGE_SECONDS: round(seconds, 3), TOKENS_PER_S: round(tokens / seconds), "shards": len(left)}
        stage.run.metrics.write(_LABEL, values)
    return _summary(folder, manifest, already=False) | {"seconds": seconds, "tokens_per_s": tokens / seconds}


def _summary(folder: Path, manifest: ShardsManifest, already: bool) -> ShardSummary:
    shards = manifest.shards
    return {
        "folder": str(folder),
        "already": already,
        "vocabulary": manifest.tokenizer.vocabulary,
        "shards": sum(len(of_split) for of_split in shards.values()),
        **{f"{split}_rows": sum(shard.rows for shard in of_split) for split, of_split in shards.items()},
        **{f"{split}_tokens": sum(shard.tokens for shard in of_split) for split, of_split in shards.items()},
    }


def _refuse_foreign(folder: Path) -> None:
    """An unfinished folder may hold what a killed run left, and hidden files; anything else is not ours to touch."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DistlmError(f"{folder}: shards need a folder, and this is a file; choose another shards.folder")
    names = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
    ours = (MANIFEST, TOKENIZER_FOLDER)
    foreign = [name for name in names if name not in ours and not SHARD_NAME.fullmatch(name)]
    if foreign:
        raise DistlmError(
            f"{folder}: holds files that are not shards ({', '.join(foreign[:3])}); choose an empty or new folder with "
            "shards.folder="
        )


def _begun_plan(folder: Path, config: ShardsConfig, settings: ShardSettings) -> ShardsPlan | None:
    """The plan of an earlier start, None in a new folder. Damaged shards of a finished folder become unfinished ones.

    On rank 0 only. Raises DistlmError when the folder was begun with other settings.
    """
    sweep_temporaries(folder)
    sweep_temporaries(folder / TOKENIZER_FOLDER)
    if (folder / MANIFEST).exists():
        manifest = ShardsManifest.read(folder)
        refuse_other_settings(folder, manifest.plan, settings)
        shards = [shard for of_split in manifest.shards.values() for shard in of_split]
        damaged = [shard.name for shard in shards if shard.problem(folder)]
        for shard in shards:
            if shard.name not in damaged:
                write_marker(folder, belonging(manifest.plan, manifest.tokenizer), shard)
        manifest.plan.record().write(folder / PLAN)
        (folder / MANIFEST).unlink()
        say(f"{_LABEL}: making missing or damaged files again: {', '.join(damaged) or TOKENIZER_FOLDER}")
    if not (folder / PLAN).exists():
        return None
    try:
        plan = ShardsPlan.read(folder / PLAN)
    except DistlmError:
        return None
    refuse_other_settings(folder, plan, settings)
    refuse_other_text(folder, plan, config)
    return plan


def _sources(config: ShardsConfig) -> Sources:
    """The sources of each split; one that takes documents of train has train's."""
    choice = choice_of_shards(config)
    opened = open_sources(choice)
    # Train's are scanned for the others, also where it is not made itself.
    return {**opened, **{split: opened[choice.origin(split)] for split in choice.splits}}


def _make_plan(stage: Stage, folder: Path, settings: ShardSettings, sources: Sources) -> ShardsPlan:
    """Scan the text, a source at a time on each rank, and write the plan. Collective."""
    comm, config = stage.comm, stage.config.section(ShardsConfig)
    choice = choice_of_shards(config)
    flat = [(split, number, source) for split in choice.read for number, source in enumerate(sources[split])]

    def scan() -> dict[tuple[str, int], Scan]:
        found = {}
        with Progress(f"{_LABEL}: scan", len(flat), "files", comm.rank) as progress:
            for split, number, source in flat[comm.rank :: comm.size]:
                shares = choice.shares if split == "train" else {}
                cutting = Cutting(source.rule(config.documents), config.shard_text, shares, SPECIALS)
                found[split, number] = source.scan(number, cutting, lambda size: _obey(stage))
                progress.advance(min(comm.size, len(flat) - progress.done))
        return found

    scans = {key: scan for part in comm.allgather(together(comm, scan)) for key, scan in part.items()}

    def plan() -> ShardsPlan:
        by_split = {
            split: [scans[choice.origin(split), number] for number in range(len(sources[split]))]
            for split in choice.splits
        }
        segments = {split: segments_of(choice, split, found) for split, found in by_split.items()}
        for split, found in segments.items():
            if not found:
                raise DistlmError(f"shards: the {split} split has no text; its files are empty")
        units = {split: plan_units(split, found, config.shard_text) for split, found in segments.items()}
        made = ShardsPlan(settings, {split: [one.facts for one in found] for split, found in by_split.items()}, units)
        made.record().write(folder / PLAN)
        if spelled := sum((Counter(scan.spelled) for scan in scans.values()), Counter[str]()):
            say(f"{_LABEL}: {spelled_note(spelled)}")
        return made

    return rank0_first(comm, plan)


def _obey(stage: Stage) -> None:
    """Inside work that one rank does while others wait: a stop signal here ends it for all."""
    if stage.stop.reason is not None:
        raise Stopped("data shard: stopped before the first shard; the same command begins anew")


def _vocabulary(stage: Stage, folder: Path, plan: ShardsPlan, sources: Sources) -> WordPiece:
    """The given vocabulary, that of an earlier start, or a new one. On rank 0 only."""
    config, place = stage.config.section(ShardsConfig), folder / TOKENIZER_FOLDER
    if config.vocabulary:
        wordpiece = WordPiece.load(Path(config.vocabulary), config.lower_case)
    elif (place / VOCABULARY).exists():
        return WordPiece.load(place, config.lower_case)
    else:
        start = time.monotonic()
        say(f"{_LABEL}: training a vocabulary of {config.vocabulary_size:,} pieces")
        wordpiece = train_wordpiece(_sample(stage, plan, sources), config.vocabulary_size, config.lower_case)
        less = "" if len(wordpiece.pieces) == config.vocabulary_size else ": the text has no more to join"
        say(f"{_LABEL}: {len(wordpiece.pieces):,} pieces after {time.monotonic() - start:.0f} s{less}")
    wordpiece.save(place, config.row_tokens)
    return wordpiece


def _sample(stage: Stage, plan: ShardsPlan, sources: Sources) -> Callable[[], Iterator[str]]:
    """The text that a vocabulary is trained on: the beginning of every shard of train, an equal share of each."""
    config, units = stage.config.section(ShardsConfig), plan.units["train"]
    share = min(1.0, (config.vocabulary_text or float("inf")) / sum(unit.bytes for unit in units))

    def texts() -> Iterator[str]:
        reader = UnitReader(sources, config.documents)
        for unit in units:
            read = 0
            with closing(reader.documents(unit)) as pieces:
                for text, _ in pieces:
                    _obey(stage)
                    yield text
                    read += len(text.encode())
                    if read >= share * unit.bytes:
                        break
        reader.close()

    return texts


def _keep_whole(folder: Path, plan: ShardsPlan, sources: Sources, wordpiece: WordPiece) -> dict[str, Shard]:
    """Shards of an earlier start that are whole, by name; the disk must hold the others. On rank 0 only."""
    units, owner = plan.all_units, belonging(plan, wordpiece.facts)
    shards = [read_marker(folder, owner, unit) for unit in units]
    whole = {shard.name: shard for shard in shards if shard is not None}
    left = [unit for unit in units if unit.name not in whole]
    for unit in left:
        # An old marker must not vouch for a file that is being replaced.
        marker_path(folder, unit.name).unlink(missing_ok=True)
        # Nor does it need room beside the new one.
        (folder / f"{unit.name}.tar").unlink(missing_ok=True)
    if left:
        text = sum(unit.bytes for unit in left)
        per_byte = _tokens_per_byte(plan, sources, wordpiece, left[0]) * id_dtype(len(wordpiece.pieces)).itemsize
        needed = int(text * per_byte)
        require_free_disk(folder, needed, f"shards ({len(left)} of {len(units)})")
        if whole:
            say(f"{_LABEL}: {len(whole)} of {len(units)} shards are complete, continuing")
        say(
            f"{_LABEL}: {format_bytes(text)} of text to {len(left)} shards of rows of "
            f"{plan.settings.row_tokens} tokens, about {format_bytes(needed)}"
        )
    return whole


def _tokens_per_byte(plan: ShardsPlan, sources: Sources, wordpiece: WordPiece, unit: Unit) -> float:
    """Of a megabyte of text, and a tenth more: special tokens, padding, tar headers, other text."""
    reader, encoder = UnitReader(sources, plan.settings.documents), Encoder(wordpiece)
    with closing(reader.documents(unit)) as pieces:
        size = tokens = 0
        while size < PIECE and (piece := next(pieces, None)) is not None:
            size += len(piece[0].encode())
            tokens += len(encoder.encode(piece[0]))
    reader.close()
    return 1.1 * max(tokens, 1) / max(size, 1)


def _write_units(
    stage: Stage, folder: Path, plan: ShardsPlan, sources: Sources, wordpiece: WordPiece, left: list[Unit]
) -> list[Shard]:
    """Write the shards that are left in turns of one per rank. Returns those of this rank. Collective."""
    comm, mine = stage.comm, []
    total = sum(unit.bytes for unit in plan.all_units)
    done = total - sum(unit.bytes for unit in left)
    # Its memory of words lasts over the shards of a rank; the ids do not depend on it.
    encoder, reader = Encoder(wordpiece), UnitReader(sources, plan.settings.documents)
    owner = belonging(plan, wordpiece.facts)
    with closing(reader), Progress(_LABEL, total, "bytes", comm.rank, done=done) as progress:
        for turn in range(ceil(len(left) / comm.size)):
            stage.stop.check(comm, _LABEL)
            now = left[turn * comm.size : (turn + 1) * comm.size]
            done += sum(unit.bytes for unit in now)

            def advance(size: int, peers: int = len(now), end: int = done) -> None:
                # Rank 0 counts for its peers too, which are as far as it is; the end of the turn is exact.
                progress.advance(min(size * peers, end - progress.done))

            def write(now: list[Unit] = now) -> None:
                if comm.rank < len(now):
                    unit = now[comm.rank]
                    with closing(reader.documents(unit, advance)) as texts:
                        shard = write_shard(folder, unit, texts, encoder, wordpiece.facts, plan.settings)
                    write_marker(folder, owner, shard)
                    mine.append(shard)

            together(comm, write)
            if progress.done < done:
                progress.advance(done - progress.done)
    return mine


def _tidy(folder: Path, plan: ShardsPlan) -> None:
    """Remove what only the making needed; what cannot be removed does no harm. On rank 0 only."""
    for path in (*(marker_path(folder, unit.name) for unit in plan.all_units), folder / PLAN):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _finish(
    folder: Path, plan: ShardsPlan, wordpiece: WordPiece, whole: dict[str, Shard], told: list[list[Shard]]
) -> ShardsManifest:
    """All shards are whole: the manifest, then the markers go. On rank 0 only."""
    shards = whole | {shard.name: shard for of_rank in told for shard in of_rank}
    by_split = {split: tuple(shards[unit.name] for unit in units) for split, units in plan.units.items()}
    for split, of_split in by_split.items():
        if not any(shard.rows for shard in of_split):
            raise DistlmError(f"shards: the {split} split gave no rows: its text has no words")
    manifest = ShardsManifest(plan, wordpiece.facts, by_split)
    manifest.write(folder)
    _tidy(folder, plan)
    counts = ", ".join(f"{split} {sum(s.tokens for s in of_split):,}" for split, of_split in by_split.items())
    say(f"{_LABEL}: {folder}: {counts} tokens, vocabulary {len(wordpiece.pieces):,}")
    return manifest
