"""The run directory: one object knows its layout, and refuses another configuration.

RUN_DIR/
  config.yaml            the resolved configuration of the latest stage
  configs/STAGE.yaml     the configuration each stage was started with
  code.json              version of the code, Python and main packages
  metrics.jsonl          the record
  tensorboard/, wandb/   views of it (train.trackers)
  tokens/                token files (unless data.tokens_dir)
  checkpoints/step-NNNNNNNN/   complete only with complete.json; best.json names the best
  finetune/NAME/         results.json of a fine-tuning, and a folder for each seed, with predictions/
  datastore/             keys and values (unless datastore.folder)
  index/NAME/            any number of indexes (unless index.folder)
  neighbours/LABEL/SPLIT/   of each question that was asked of the store (question.py)
  states/SPLIT/          hidden states of the evaluated tokens, where no search has kept them
  cache/SPLIT/           the neural cache's probability of every evaluated token
  tuned/LABEL.json       settings tuned on the first split, frozen for the others; knn.json the newest
  results/LABEL.json     perplexities of a question; results.json the newest
  losses/LABEL/          loss of every evaluated token, LM and mixtures
  report.html
  logs/STAGE.log
"""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from distlm import __version__
from distlm.config.load import config_tree, dump_config, leaf_fields, load_config
from distlm.config.schema import RunConfig, sections_of
from distlm.config.yaml_files import recorded_settings
from distlm.errors import DistlmError, UsageError
from distlm.models.registry import kind, kind_names, not_causal
from distlm.runtime import question
from distlm.runtime.files import atomic_path
from distlm.runtime.lock import is_lock
from distlm.runtime.metrics import MetricsFile
from distlm.runtime.records import BestCheckpoint, CodeSnapshot, CodeVersion, Record, RunCode

STAGES: dict[str, tuple[str, ...]] = {
    "prepare": ("data",),
    "shard": ("shards",),
    "train": (),
    "finetune": ("finetune",),
    "datastore": ("datastore",),
    "index": ("datastore", "index"),
    "knn": ("datastore", "index", "knn", "cache"),
}
"""Stages in order, and the sections of their own whose settings decide their output."""
NEWEST_TUNED, NEWEST_RESULTS = "knn.json", "results.json"
_FILES_OF = {
    "prepare": ("the token files", ""), "shard": ("the shards", ""), "train": ("the checkpoints", "train"),
    "finetune": ("the results of finetune/", ""), "datastore": ("the datastore", "datastore"),
    "index": ("the index", "index"), "knn": ("neighbours, cache and results", "search"),
}  # fmt: skip
"""Stage → its files in words, and what `distlm clean` calls them."""
_OF_THE_MODEL = ("train", "datastore", "index", "knn")
"""Stages whose output depends on the model, too."""


def stage_sections(stage: str, kind_name: str) -> tuple[str, ...]:
    """Sections of a kind of model whose settings decide a stage's output."""
    found = kind(kind_name)
    of_model = found.model_sections if stage in _OF_THE_MODEL else ()
    return tuple(section for section in (*of_model, *STAGES[stage]) if section in sections_of(found.config))


def refuse_foreign_stage(config: RunConfig, stage: str, verb: str) -> None:
    """UsageError for a stage that is not for this kind of model."""
    name = config.model.kind
    if not STAGES[stage] or STAGES[stage][-1] in sections_of(type(config)) or (stage == "knn" and kind(name).causal):
        return
    readers = [other for other in kind_names() if STAGES[stage][-1] in sections_of(kind(other).config)]
    why = not_causal() if stage in _OF_THE_MODEL else f"it is for model.kind={' and '.join(readers)}"
    raise UsageError(f"`distlm {verb}` with model.kind={name}: {why}")


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths of a run."""

    root: Path
    config: RunConfig | None = dataclasses.field(default=None, compare=False, repr=False)
    """Which datastore, index and question are meant; None: those of the latest stage, by its config.yaml."""

    @classmethod
    def of(cls, config: RunConfig) -> "RunDir":
        """The run directory of a configuration, and the files that it asks for."""
        return cls(Path(config.run_dir), config)

    @cached_property
    def _asked(self) -> RunConfig:
        recorded = self.root / "config.yaml"
        return self.config or (load_config(str(recorded)) if recorded.is_file() else RunConfig())

    @property
    def metrics(self) -> MetricsFile:
        """The run's record."""
        return MetricsFile(self.root / "metrics.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.root / "checkpoints"

    @property
    def datastore(self) -> Path:
        """Datastore directory."""
        chosen = self._asked.datastore.folder
        return Path(chosen) if chosen else self.root / "datastore"

    @property
    def index(self) -> Path:
        """Index directory."""
        return question.index_folder(self.root, self._asked)

    @property
    def label(self) -> str:
        """Name of the question in names of files."""
        return question.label(self._asked)

    @property
    def tuned(self) -> Path:
        """Frozen kNN settings."""
        return question.answer(self.root, self._asked, "tuned", NEWEST_TUNED)

    @property
    def results(self) -> Path:
        """Evaluation results."""
        return question.answer(self.root, self._asked, "results", NEWEST_RESULTS)

    def write_tuned(self, tuned: Record) -> None:
        """Write the frozen settings of this question, and as the newest."""
        tuned.write(question.own_answer(self.root, self._asked, "tuned"))
        tuned.write(self.root / NEWEST_TUNED)

    def write_results(self, results: Record) -> None:
        """Write the results of this question, and as the newest."""
        results.write(question.own_answer(self.root, self._asked, "results"))
        results.write(self.root / NEWEST_RESULTS)

    def all_results(self) -> dict[str, Path]:
        """Label → results of every question that was answered; of an older version `results`."""
        found = {path.stem: path for path in sorted((self.root / "results").glob("*.json"))}
        old = self.root / NEWEST_RESULTS
        return found or ({"results": old} if old.exists() else {})

    @property
    def report(self) -> Path:
        """HTML report."""
        return self.root / "report.html"

    @property
    def logs(self) -> Path:
        """Folder of stage logs."""
        return self.root / "logs"

    def neighbours(self, split: str) -> Path:
        """Folder of a split's search results."""
        return question.neighbours_folder(self.root, self._asked, split)

    def kept_neighbours(self, split: str) -> Path:
        """Finished search results that answer the question: its own, or of a larger k; else the place of its own."""
        return question.kept_neighbours(self.root, self._asked, split)

    def states(self, split: str) -> Path:
        """Folder of a split's hidden states."""
        return self.root / "states" / split

    def cache(self, split: str) -> Path:
        """Folder of a split's neural-cache probabilities."""
        return self.root / "cache" / split

    @property
    def losses(self) -> Path:
        """Folder of per-token losses."""
        old, own = self.root / "losses", self.root / "losses" / self.label
        return old if (old / "dict.txt").exists() and not own.exists() else own

    def tokens(self, config: RunConfig) -> Path:
        """Folder of token files: data.tokens_dir or RUN_DIR/tokens."""
        return Path(config.data.tokens_dir) if config.data.tokens_dir else self.root / "tokens"

    def shards(self, config: RunConfig) -> Path:
        """Folder of shards of token rows: shards.folder, where the kind of model reads it, or RUN_DIR/shards."""
        section = getattr(config, "shards", None)
        return Path(section.folder) if section and section.folder else self.root / "shards"

    def finetune(self, name: str) -> Path:
        """Folder of a fine-tuning's results, by finetune.name."""
        return self.root / "finetune" / name

    def checkpoint(self, step: int) -> Path:
        """Checkpoint folder of an update count."""
        return self.checkpoints / f"step-{step:08d}"

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints whose marker is written, oldest first."""
        return sorted(marker.parent for marker in self.checkpoints.glob("step-*/complete.json"))

    def newest_checkpoint(self) -> Path:
        """The last complete checkpoint. Raises DistlmError when there is none."""
        complete = self.complete_checkpoints()
        if not complete:
            raise DistlmError(f"{self.checkpoints}: no trained model yet; run `distlm train` first")
        return complete[-1]

    def model_checkpoint(self, config: RunConfig) -> Path:
        """The checkpoint later stages read: datastore.checkpoint, else the best one of this run.

        Raises DistlmError when there is none.
        """
        if config.datastore.checkpoint:
            chosen = Path(config.datastore.checkpoint)
            other = RunDir(chosen)
            if other._best.exists():
                chosen = other.best_checkpoint()
            if not (chosen / "complete.json").exists():
                raise DistlmError(
                    f"datastore.checkpoint={chosen}: neither a complete checkpoint (no complete.json in it) nor a run "
                    "directory with one"
                )
            return chosen
        return self.best_checkpoint()

    @property
    def _best(self) -> Path:
        return self.checkpoints / "best.json"

    def best_checkpoint(self) -> Path:
        """The checkpoint of the lowest validation loss. Raises DistlmError when there is none."""
        if not self._best.exists():
            raise DistlmError(f"{self.checkpoints}: no trained model yet; run `distlm train` first")
        return self.checkpoints / BestCheckpoint.read(self._best).checkpoint

    def open_stage(self, config: RunConfig, stage: str) -> None:
        """Record the configuration of a stage that is about to run. Call on rank 0, before any work.

        Raises DistlmError when files of this or an earlier stage were made here with other settings, naming the fields.
        """
        if self.root.exists() and not self.root.is_dir():
            raise DistlmError(f"run_dir={self.root}: is a file; give a folder, or a name that is not there yet")
        self.refuse_other_config(config, stage)
        self.root.mkdir(parents=True, exist_ok=True)
        if stage == "knn":
            question.keep_old_answers(self.root)
        for name in ("config.yaml", f"configs/{stage}.yaml"):
            with atomic_path(self.root / name) as temporary:
                temporary.write_text(dump_config(config), "utf-8")
        code = code_version()
        RunCode(distlm=code.distlm, git=code.git, python=code.python, libraries=code.libraries).write(
            self.root / "code.json"
        )

    def withdraw_stage(self, config: RunConfig, stage: str) -> None:
        """Forget the recorded configuration of a stage that was refused before it produced anything. On rank 0."""
        if not self._produced(config_tree(config), stage):
            (self.root / "configs" / f"{stage}.yaml").unlink(missing_ok=True)

    def _produced(self, settings: Mapping[str, Any], stage: str) -> bool:
        """Whether a stage with these settings (section → setting → value) has left files that follow from them."""

        def folder(section: str, setting: str, own: str) -> Path:
            return Path(settings.get(section, {}).get(setting) or self.root / own)

        match stage:
            case "prepare":
                return (folder("data", "tokens_dir", "tokens") / "meta.json").exists()
            case "shard":
                shards = folder("shards", "folder", "shards")
                return any((shards / name).exists() for name in (".plan.json", "manifest.json"))
            case "train":
                return any(self.checkpoints.glob("step-*"))
            case "finetune":
                return any((self.root / "finetune").glob("*/settings.json"))
            case "datastore":
                return (folder("datastore", "folder", "datastore") / "manifest.json").exists()
            case "index":
                roots = (self.root / "index", folder("index", "folder", "index"))
                return any(file for root in roots for file in root.rglob("template.json"))
        answers = [self.root / name for name in ("neighbours", "cache", "states", "tuned", "results", "losses")]
        newest = any((self.root / name).exists() for name in (NEWEST_TUNED, NEWEST_RESULTS))
        return newest or any(map(_holds_files, (*answers, folder("knn", "folder", "neighbours"))))

    def refuse_other_config(self, config: RunConfig, stage: str) -> None:
        """DistlmError when files of this or an earlier stage were made here with other settings, naming the fields."""
        order = list(STAGES)
        for earlier in order[: order.index(stage) + 1]:
            self._compare(config, earlier)

    def _compare(self, config: RunConfig, stage: str) -> None:
        before, now = recorded_settings(self.root / "configs" / f"{stage}.yaml"), config_tree(config)
        # A start that was killed, or ran out of memory on another rank, leaves its settings and no file of them.
        if not before or not self._produced(before, stage):
            return
        # A setting that is newer than the run had its default value then.
        defaults, sections = config_tree(type(config)()), stage_sections(stage, config.model.kind)
        changed = []
        for key, item in leaf_fields(type(config)).items():
            section, _, name = key.partition(".")
            if section not in sections or item.metadata.get("volatile") or item.metadata.get("question"):
                continue
            old, new = before.get(section, {}).get(name, defaults[section][name]), now[section][name]
            if old == new:
                continue
            why = kind(config.model.kind).may_grow(before, config, key) if _grows(item, old, new) else None
            if why != "":
                changed.append(f"{key}: {old!r} there, {new!r} now{': ' if why else ''}{why or ''}")
        if changed:
            made, what = _FILES_OF[stage]
            mend = f"remove them with `distlm clean {self.root} {what}`, or " if what else ""
            raise DistlmError(
                f"{self.root}: {made} there were made with other settings ({'; '.join(changed)}); {mend}use another "
                "run_dir= or the same settings"
            )


def _holds_files(folder: Path) -> bool:
    return any(path.is_file() and not is_lock(path) for path in folder.rglob("*"))


def _grows(item: dataclasses.Field[Any], old: Any, new: Any) -> bool:
    return bool(item.metadata.get("length")) and isinstance(old, int) and bool(new > old)


def code_version() -> CodeVersion:
    """Version of distlm (with git commit and whether the tree is changed, where there is one) and of its libraries."""
    here = Path(__file__).resolve().parent
    libraries = {}
    for name in ("torch", "deepspeed", "faiss-cpu", "faiss-gpu", "mpi4py", "numpy"):
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return CodeVersion(__version__, _commit(here), sys.version.split()[0], libraries)


def _commit(here: Path) -> str | None:
    """The commit of the code; of a snapshot (launchers/stages/snapshot.py) the one it was made of."""
    snapshot = here.parents[1] / "VERSION.json"
    if snapshot.exists():
        return CodeSnapshot.read(snapshot).git
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        # No git on this node.
        return None
    return git.stdout.strip() or None
