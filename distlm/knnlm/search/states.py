"""Hidden state, target and log-probability of every evaluated token, as files.

`knn search` keeps them with the neighbours. Where nothing was searched, or the neural cache uses another hidden
state than the datastore, they are computed alone, into RUN/states/SPLIT: the same units, the same bytes.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.config.schema import RunConfig
from distlm.data.blocks import Blocks, eval_blocks
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError
from distlm.knnlm.search.carried import carried_bytes, open_carried
from distlm.knnlm.search.cut import Cut, cut_of, planned_cut
from distlm.knnlm.search.disk import TokenBytes
from distlm.knnlm.search.forward import Forward, context_rule, token_states
from distlm.knnlm.search.neighbours import MANIFEST, PLAN
from distlm.knnlm.search.records import NeighboursManifest, StatesManifest, StatesPlan
from distlm.knnlm.search.units import UnitFolder, read_array, read_arrays, read_manifest
from distlm.models.card import model_of_card, read_model_card
from distlm.models.described import causal
from distlm.models.language_model import LanguageModel
from distlm.runtime.files import json_hash, read_json
from distlm.runtime.rundir import RunDir

HEAD = (
    "split", "tokens", "blocks", "blocks_per_unit", "batch_blocks", "context_window", "block", "context_rule", "tap",
    "key_dtype", "model", "dictionary", "token_files",
)  # fmt: skip
"""Fields of the manifest that decide the states; that of neighbours has them too."""
CUT = ("blocks_per_unit", "batch_blocks")
"""Those of them that say how the work was cut."""
ARRAYS = ("queries", "targets", "log_probs")
COMMAND = "distlm knn cache"


@dataclass(frozen=True)
class States:
    """States of one split, from a finished search or from a forward pass of their own."""

    folder: Path
    manifest: StatesManifest | NeighboursManifest

    @classmethod
    def open(cls, folder: Path) -> "States":
        """Open a finished folder of states or neighbours. Raises DistlmError as units.read_manifest."""
        return cls(folder, read_manifest(folder, read_kept, COMMAND))

    @property
    def tokens(self) -> int:
        """Evaluated tokens Q."""
        return self.manifest.tokens

    @property
    def tap(self) -> str:
        """Name of the hidden state."""
        return self.manifest.tap

    @cached_property
    def bounds(self) -> list[int]:
        """First token of each unit, and the number of tokens."""
        return [0, *accumulate(unit.rows for unit in self.manifest.units)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the settings and of every array; the same from neighbours and from a forward pass."""
        units = [[unit.rows, *(unit.hashes[name] for name in ARRAYS)] for unit in self.manifest.units]
        return json_hash([{key: getattr(self.manifest, key) for key in HEAD}, units])

    def targets(self) -> npt.NDArray[np.int32]:
        """The tokens: int32 [Q]."""
        return np.concatenate(list(read_arrays(self.folder, self.manifest, "targets")))

    def log_probs(self) -> npt.NDArray[np.float64]:
        """The language model's log-probability of every token: fp64 [Q]."""
        return np.concatenate(list(read_arrays(self.folder, self.manifest, "log_probs")))

    def rows(self, name: str, first: int, last: int) -> npt.NDArray[Any]:
        """Rows [first, last) of "queries" or "targets", copied into memory; only their units are read."""
        parts = []
        for number, (start, end) in enumerate(pairwise(self.bounds)):
            if start < last and end > first:
                array = read_array(self.folder, self.manifest, number, name)
                parts.append(array[max(0, first - start) : last - start])
        return np.concatenate(parts)


def read_kept(path: Path) -> StatesManifest | NeighboursManifest:
    """The manifest of a folder of states or of neighbours. Raises DistlmError as Record.read."""
    tree = read_json(path, "description of a folder of results")
    searched = isinstance(tree, dict) and tree.get("kind") == "neighbours"
    return NeighboursManifest.of_file(tree, path) if searched else StatesManifest.of_file(tree, path)


def states_plan(
    config: RunConfig, tokens: TokenFiles, model: str, split: str, blocks: Blocks, cut: Cut, begins: bool = False
) -> StatesPlan:
    """A split's states as the configuration wants them; `model` is the model's fingerprint, `begins` its own, too."""
    knn = config.knn
    return StatesPlan(
        kind="states", split=split, tokens=int(blocks.scored.sum()), blocks=len(blocks),
        blocks_per_unit=cut.blocks_per_unit, batch_blocks=cut.batch_blocks,
        context_window=knn.context_window, block=knn.block,
        context_rule=context_rule(knn, begins),
        tap=config.cache.tap or config.datastore.tap, key_dtype=config.datastore.key_dtype,
        model=model, dictionary=tokens.dictionary.hash, token_files=tokens.fingerprint,
    )  # fmt: skip


class StatesWork:
    """The states of one split: where they are, or how they are made; no method is collective."""

    def __init__(self, config: RunConfig, run: RunDir, tokens: TokenFiles, model: str, split: str) -> None:
        knn = config.knn
        self.split = split
        self.blocks = eval_blocks(tokens.split(split), knn.context_window, knn.block)
        self._searched, own = run.kept_neighbours(split), run.states(split)
        begins = causal(model_of_card(read_model_card(run.model_checkpoint(config)))).begins

        def plan(cut: Cut) -> StatesPlan:
            return states_plan(config, tokens, model, split, self.blocks, cut, begins)

        # A search and states that were begun before may be cut differently: what is finished counts first.
        wanted = plan(planned_cut(len(self.blocks), knn))
        finished = [folder / MANIFEST for folder in (self._searched, own) if _answers(folder / MANIFEST, wanted, CUT)]
        self.cut = cut_of(self.blocks, knn, *finished, own / PLAN, self._searched / PLAN)
        self.units = self.cut.units(len(self.blocks))
        self.plan = plan(self.cut)
        self.files = UnitFolder(own, self.plan, StatesManifest, len(self.units), COMMAND)

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return self.plan.tokens

    def kept(self) -> States | None:
        """The states, where a finished search or forward pass has left just these."""
        for folder in (self._searched, self.files.folder):
            if _answers(folder / MANIFEST, self.plan):
                return States.open(folder)
        return None

    @property
    def folder(self) -> Path:
        """The folder that is being filled."""
        return self.files.folder

    def bytes(self, model: LanguageModel, carry: bool) -> int:
        """Disk that they take while they are made; `carry`: knn.carry."""
        of_token = TokenBytes.of(model.width, np.dtype(self.plan.key_dtype).itemsize, k=0).kept
        return self.tokens * of_token + carried_bytes(model, self.blocks, carry)

    def compute_units(self, forward: Forward, numbers: Sequence[int]) -> None:
        """Forward passes of some units."""
        dtype, units = np.dtype(self.plan.key_dtype), [self.units[number] for number in numbers]
        before = open_carried(self.files.folder) if forward.knn.carry else None
        tap = self.plan.tap
        with closing(token_states(forward, self.split, self.blocks, units, self.cut, tap, dtype, before)) as found:
            for number, states in zip(numbers, found, strict=True):
                self.files.write(number, states._asdict())

    def states(self) -> States:
        """The states, after they were made."""
        found = self.kept()
        if found is None:
            raise DistlmError(f"{self.files.folder}: not finished; run `{COMMAND}` again")
        return found


def _answers(path: Path, plan: StatesPlan, but: Sequence[str] = ()) -> bool:
    """Whether the manifest `path` is there and has the states of `plan`, but for some fields."""
    if not path.is_file():
        return False
    manifest = read_kept(path)
    return all(getattr(manifest, key) == getattr(plan, key) for key in HEAD if key not in but)
