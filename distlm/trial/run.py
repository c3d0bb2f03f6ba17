"""`distlm plan --measure`: the first stages of a recipe in small, on made-up text: plans then know their speed.

A stage's plan counts its work and divides it by a rate. The rate of a model on a machine is known by running it for
some seconds: the same command, ranks and launcher, with fewer updates and less text. What it took is kept where
`distlm run` keeps what stages took (runtime/speeds.py).
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import mkdtemp

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.data.estimate import expected_tokens
from distlm.errors import EXIT_DONE, EXIT_STOPPED, DistlmError
from distlm.models.registry import kind
from distlm.pipeline import STEPS, counted, run_step, speed_of, stage_command, steps_of
from distlm.runtime.child import until_told_twice
from distlm.runtime.progress import format_seconds, say
from distlm.runtime.rundir import RunDir
from distlm.runtime.speeds import measured
from distlm.trial.made_up import write_made_up

TRIED = ("train", "datastore write")
"""Stages whose speed is that of the model. Those behind are counted from rates of faiss, or take what is known then."""
_BEFORE = ("data prepare", "data shard")
_PLANNED_S = 6.0
"""Each is as long as its plan, before it is corrected, says so many seconds; it takes some times that."""
_TOO_LONG_S = 120.0
_TOKENS = 200_000
"""Of the made-up text to begin with."""
_MOST_TOKENS = 20_000_000


def try_in_small(config: RunConfig, recipe: str, overrides: Sequence[str]) -> int:
    """Time what is not timed yet of these stages; an exit code: 75 when it was told to stop.

    Raises DistlmError when a stage fails, which the recipe's own would, too.
    """
    run = RunDir.of(config)
    steps = [step for step in steps_of(config) if step.words in TRIED and not step.finished(config, run)]
    wanted = [step for step in steps if not measured(speed_of(step, config))]
    if not wanted:
        say("plan: every stage that can be tried in small has been timed on this machine, or is finished")
        return EXIT_DONE
    if config.datastore.checkpoint:
        say(f"plan: datastore.checkpoint={config.datastore.checkpoint} is of another run's words; nothing is tried")
        return EXIT_DONE
    if kind(config.model.kind).in_small(config, 1.0) is None:
        say(f"plan: a {config.model.kind} cannot be tried in small; `distlm run` keeps what its stages take")
        return EXIT_DONE
    with until_told_twice() as stop, _folder(config) as folder:
        small = _Small(config, recipe, overrides, folder)
        last = max(steps_of(config).index(step) for step in wanted)
        for step in steps_of(config)[: last + 1]:
            if step.words not in (*_BEFORE, *TRIED):
                continue
            seconds = counted(step, small.config).seconds or 0.0
            if seconds > _TOO_LONG_S:
                say(f"plan: {step.words} is not tried: even in small it would take {format_seconds(seconds)} or more")
                return EXIT_DONE
            say(f"plan: trying {step.words} in small" if step in wanted else f"plan: {step.words}, for the trial")
            command = stage_command(step, small.config, recipe, small.overrides)
            try:
                with (folder / "output.log").open("a", encoding="utf-8") as log, redirect_stdout(log):
                    of = speed_of(step, config) if step in wanted else None
                    took = run_step(step, small.config, command, stop, of)
            except DistlmError as error:
                said = (folder / "output.log").read_text("utf-8").splitlines()
                # Behind the stage's own word a launcher has many.
                why = [line for line in said if "distlm: " in line][:1] or said[-5:]
                raise DistlmError("\n".join([f"`distlm {step.words}` failed when tried in small:", *why])) from error
            if took is None:
                return EXIT_STOPPED
    return EXIT_DONE


@contextmanager
def _folder(config: RunConfig) -> Iterator[Path]:
    """Beside the run directory, on the disk that the run will use; gone afterwards."""
    parent = Path(config.run_dir).absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    folder = Path(mkdtemp(prefix=".distlm-trial-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Small:
    """The configuration of the trial: that of a run, with less of everything, below a folder of its own."""

    def __init__(self, config: RunConfig, recipe: str, overrides: Sequence[str], folder: Path) -> None:
        """Writes the made-up text. Raises DistlmError for settings that cannot work."""
        self._config, self._recipe, self._overrides = config, recipe, overrides
        self._folder, self._kind = folder, kind(config.model.kind)
        known = expected_tokens(config) if self._kind.causal else None
        # Pieces of a WordPiece vocabulary come from about as many words.
        self._words = (known.words if known else 30_000) or self._kind.assumed_words(config)
        self._tokens = _TOKENS + 2 * self._words
        whole = self._write(1.0)
        if STEPS["datastore write"] in steps_of(config):
            seconds = counted(STEPS["datastore write"], whole).seconds or 1.0
            self._tokens = min(_MOST_TOKENS, max(2 * self._words, round(self._tokens * _PLANNED_S / seconds)))
            whole = self._write(1.0)
        seconds = counted(STEPS["train"], whole).seconds or 1.0
        self.overrides = self._given(min(1.0, _PLANNED_S / seconds))
        self.config = load_config(recipe, self.overrides)

    def _write(self, share: float) -> RunConfig:
        shutil.rmtree(self._folder / "text", ignore_errors=True)
        write_made_up(self._folder / "text", self._words, {"train": self._tokens, "valid": 2000, "test": 2000})
        return load_config(self._recipe, self._given(share))

    def _given(self, share: float) -> list[str]:
        """Overrides with which training does this share of its work."""
        section = "data" if self._kind.causal else "shards"
        own: dict[str, object] = {
            **(self._kind.in_small(self._config, share) or {}),
            "run_dir": self._folder / "run", f"{section}.source": "folder",
            f"{section}.text_dir": self._folder / "text", f"{section}.valid_share": 0, f"{section}.test_share": 0,
            "train.trackers": [], "train.max_updates_this_run": 0,
        }  # fmt: skip
        if self._kind.causal:
            own |= {
                "data.tokens_dir": "", "datastore.folder": "", "index.folder": "", "datastore.split": "train",
                # As many shards as ranks, of one size.
                "datastore.rows_per_shard": max(1, self._tokens // self._config.launch.ranks),
            }  # fmt: skip
        else:
            own["shards.folder"] = ""
        return [*self._overrides, *(f"{key}={value}" for key, value in own.items())]
