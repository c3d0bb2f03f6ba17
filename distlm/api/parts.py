"""The parts of a run, opened when they are first asked for, and refused by name and command when they are not there."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlm.config.schema import RunConfig
from distlm.errors import DistlmError, UsageError
from distlm.models.registry import kind, not_causal
from distlm.runtime.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from distlm.api.search import Index
    from distlm.api.words import Words
    from distlm.data.tokens import TokenFiles
    from distlm.datastore.reader import Datastore
    from distlm.knnlm.evaluate.parts import Frozen
    from distlm.knnlm.generate.words import Generator
    from distlm.knnlm.search.forward import Forward
    from distlm.knnlm.search.source import Source


class Parts:
    """What Run opens and keeps. Everything that computes is imported here when it is needed."""

    def __init__(self, config: RunConfig, device: torch.device | str, settings: Sequence[str]) -> None:
        self._config, self._device, self._run = config, device, RunDir.of(config)
        self._settings = settings
        self._generator: tuple[Frozen | None, Generator] | None = None

    @property
    def causal(self) -> bool:
        """The model predicts the next word."""
        return kind(self._config.model.kind).causal

    def require_causal(self) -> None:
        """DistlmError for a masked language model."""
        if not self.causal:
            raise DistlmError(f"{self._run.root}: {not_causal()}")

    def missing(self, what: str, where: Path, verb: str, more: str = "", *settings: str) -> DistlmError:
        """The error for a part that is not there or not finished, with the command that makes it."""
        command = shlex.join(["distlm", *verb.split(), str(self._run.root), *self._settings, *settings])
        return DistlmError(f"{where}: no {what} in {self._run.root}; `{command}` makes it{more}")

    @cached_property
    def words(self) -> Words:
        """Of the token files, or of a masked language model's shards."""
        from distlm.api.words import TokenWords, WordPieces
        from distlm.data.shards.files import MANIFEST, TOKENIZER_FOLDER
        from distlm.data.shards.records import ManifestFile

        if self.causal:
            return TokenWords(self.tokens)
        folder = self._run.shards(self._config)
        if not (folder / MANIFEST).is_file():
            raise self.missing("finished shards", folder, "data shard")
        return WordPieces(folder / TOKENIZER_FOLDER, ManifestFile.read(folder / MANIFEST).tokenizer)

    @cached_property
    def tokens(self) -> TokenFiles:
        """Token files of all splits."""
        from distlm.data.tokens import META, TokenFiles

        self.require_causal()
        folder = self._run.tokens(self._config)
        if not (folder / META).is_file():
            raise self.missing("finished token files", folder, "data prepare")
        return TokenFiles.open(folder)

    @cached_property
    def _loaded(self) -> tuple[Any, Path]:
        named = self.causal and self._config.datastore.checkpoint
        if not named and not self._run.complete_checkpoints():
            raise self.missing("trained model", self._run.checkpoints, "train")
        return kind(self._config.model.kind).load(self._config, self._run, self._device)

    @property
    def model(self) -> Any:
        """In eval mode."""
        return self._loaded[0]

    @property
    def checkpoint(self) -> Path:
        """Its folder."""
        return self._loaded[1]

    @cached_property
    def datastore(self) -> Datastore:
        """Finished and memory-mapped."""
        from distlm.datastore.manifest import MANIFEST, read_manifest
        from distlm.datastore.reader import Datastore

        self.require_causal()
        folder = self._run.datastore
        if not (folder / MANIFEST).is_file():
            raise self.missing("datastore", folder, "datastore write")
        if not read_manifest(folder).complete:
            raise self.missing("finished datastore", folder, "datastore write")
        return Datastore.open(folder)

    @cached_property
    def index(self) -> Index:
        """Finished, of this datastore."""
        from distlm.api.search import Index
        from distlm.index import open_index
        from distlm.index.layout import IndexFolder

        store, folder, knn = self.datastore, self._run.index, self._config.knn
        if not IndexFolder(folder).index_json.is_file():
            raise self.missing("finished index", folder, "index build")
        # The GPU of knn.scan=gpu is for thousands of queries.
        opened = open_index(folder, store, "queries" if knn.scan == "gpu" else knn.scan)
        return Index(opened, folder, store, self.words, knn)

    @cached_property
    def forward(self) -> Forward:
        """Token files and model, checked against each other."""
        from distlm.knnlm.search.forward import forward_of

        return forward_of(self._config.knn, self.tokens, self.model, self.checkpoint)

    @cached_property
    def source(self) -> Source:
        """The same with datastore and index."""
        from distlm.knnlm.search.source import source_of

        store = self.datastore
        index = self.index.searcher if self._config.knn.search == "index" else None
        return source_of(self.forward, store, index)

    def neighbours(self, split: str, label: str | None) -> Path:
        """Folder of a split's finished neighbours."""
        from distlm.knnlm.search.neighbours import MANIFEST

        self.require_causal()
        root = self._run.root / "neighbours"
        folder = self._run.kept_neighbours(split) if label is None else root / label / split
        if (folder / MANIFEST).is_file():
            return folder
        # Refuses a split that there is not.
        self.tokens.split(split)
        if label is None:
            asked = [] if split in self._config.knn.splits else [f"knn.splits=[{split}]"]
            raise self.missing(f"finished neighbours of {split}", folder, "knn search", "", *asked)
        there = sorted(path.parent.parent.name for path in root.glob(f"*/{split}/{MANIFEST}"))
        raise DistlmError(
            f"{folder}: no finished neighbours of {split} under that label; there are {', '.join(there) or 'none'}"
        )

    def generator(self, frozen: Frozen | None) -> Generator:
        """Next words, with neighbours where λ, temperature and k are given. The last one is kept: it knows the states
        of the text before, and has its tokenizer open."""
        from distlm.knnlm.generate.words import Generator

        if self._generator is None or self._generator[0] != frozen:
            self._generator = frozen, Generator(self.forward if frozen is None else self.source, frozen)
        return self._generator[1]

    def frozen(self, lam: float | None, temperature: float | None, k: int | None) -> Frozen:
        """λ, temperature and k as given, the others as `distlm knn tune` chose them. Raises UsageError for impossible
        ones."""
        from distlm.knnlm.evaluate.belonging import frozen_for
        from distlm.knnlm.evaluate.parts import Frozen

        for name, value, good, rule in (
            ("lam", lam, lam is None or 0 <= lam <= 1, "in [0, 1]"),
            ("temperature", temperature, temperature is None or temperature > 0, "above 0"),
            ("k", k, k is None or k >= 1, "at least 1"),
        ):
            if not good:
                raise UsageError(f"{name}={value}: must be {rule}")
        store = self.datastore
        if lam is not None and temperature is not None and k is not None:
            return Frozen(lam, temperature, k, "", "")
        if not self._run.tuned.is_file():
            raise self.missing(
                "tuned λ, temperature and k", self._run.tuned, "knn tune",
                "; or give lam=, temperature= and k=, or knn=False for the model alone",
            )  # fmt: skip
        tuned = frozen_for(self._run, store)
        return Frozen(
            tuned.weight if lam is None else lam, tuned.temperature if temperature is None else temperature,
            tuned.k if k is None else k, tuned.split, tuned.neighbours,
        )  # fmt: skip
