"""`distlm.KnnLM`: neighbours for any causal language model of Hugging Face, which stays as it is."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distlm.data.dictionary import Dictionary
from distlm.data.subwords import FIRST_PIECE, Subwords
from distlm.datastore.held import HeldDatastore, hold_store
from distlm.datastore.lengths import block_lengths
from distlm.datastore.plan import StorePlan, plan_store
from distlm.datastore.reader import Datastore
from distlm.datastore.settings import Settings
from distlm.datastore.writer import StoreJob, write_alone
from distlm.errors import DistlmError, UsageError
from distlm.index.build.memory import build_in_memory
from distlm.index.search.searcher import open_index
from distlm.installed import install
from distlm.integrations.evaluating import evaluating
from distlm.integrations.mixture import Mixing
from distlm.integrations.retrieve import Retriever
from distlm.integrations.same_model import check_keys, parameters_hash
from distlm.integrations.scorer import Scorer, TokenLogProbs
from distlm.integrations.taps import default_tap
from distlm.integrations.tuning import tried, tuned
from distlm.models.hf.model import begin_piece, wrapped
from distlm.runtime.files import bytes_hash, json_hash

BLOCK = 512
"""Most tokens of an evaluation block, and of the context before it, where nothing else is asked for."""
FLAT = "Flat"
"""Every key is compared, without an index."""
Text = str | Iterable[str] | Sequence[int] | npt.NDArray[np.integer]
"""A text, several, or the ids of the tokenizer of one."""


class KnnLM:
    """A causal language model of Hugging Face with a datastore (Khandelwal et al. 2020).

        knn = distlm.KnnLM(model, tokenizer)
        knn.add(texts)
        knn.build_index("IVF64,PQ16")
        knn.log_probs("some text").mixture      # ln p of each token
        model.generate(**inputs, logits_processor=[distlm.KnnLogitsProcessor(knn, lam=0.25)])

    The model is neither changed nor copied, and computes where and in the precision it is in; threads that ask at once
    wait for each other. Texts become tokens as in a run with model.kind=hf: line by line, each line with one token for
    its end, so that a store, its index and the numbers are those of `distlm datastore write`, `index build` and `knn
    evaluate` (the same blocks given).
    """

    def __init__(
        self, model: Any, tokenizer: Any, tap: str | None = None, line_end: str = "", begin: str = "auto"
    ) -> None:
        """`model`: of AutoModelForCausalLM; `tokenizer`: its own, of transformers (a fast one) or `tokenizers`.

        `tap`: the hidden state that is the key, as settings name it: MODULE:input, MODULE:output or "output"; None:
        the input of the last layer's feed-forward part, where one can be told by its name, else "output".
        `line_end`: the piece that ends a line, as data.line_end. `begin`: the piece in front of each block of text,
        as hf.begin: auto, the one that the tokenizer puts in front of a text (Gemma, Llama), where it does; none.
        Raises DistlmError for a model that is not causal or whose logits are not a function of its last hidden state,
        and a tokenizer that is not fast or not its own; UsageError for an unknown tap or piece.
        """
        self.model = model
        """The model that was given."""
        self.subwords = Subwords.of(_library_tokenizer(tokenizer), line_end)
        """Its tokenizer, and the piece that stands for the end of a line."""
        with evaluating(model):
            first = begin_piece(begin, self.subwords, f"begin={begin!r}: the tokenizer")
            self.lm = wrapped(model, len(self.subwords.pieces), self.subwords.line_end, first)
        """The same model over the ids of sub-word token files."""
        self.tap = tap or default_tap(model)
        """The hidden state that is the key."""
        self._tap_given = tap is not None
        self.lm.require_tap(self.tap, "tap")
        self.mixing = Mixing()
        """λ, temperature and k where none are given; `tune` sets them."""
        self._store: Datastore | None = None
        self._retriever: Retriever | None = None

    @classmethod
    def of_run(cls, run: str | Path, settings: Sequence[str] = (), mixture: str = "", skip: float = 0.0) -> "KnnLM":
        """That of a finished run with model.kind=hf: its model (`model`, for `generate`), tokenizer, datastore, index,
        and in `mixing` what `distlm knn tune` chose. `settings` are KEY=VALUE as on the command line.

        `mixture`: "knn", one λ; "knn_buckets", λ by the nearest distance; "gate", λ by the run's gate; empty: the
        buckets where the run has them. `skip`: share of the searches that the gate leaves out, 0, 0.1, …, 1.
        Raises DistlmError for a run of another kind, one that is not tuned, a mixture that it has not, and parts that
        do not belong together; UsageError for an unknown mixture and for `skip` without a gate.
        """
        from distlm.integrations.reading import knn_lm_of_run

        return knn_lm_of_run(run, settings, mixture, skip)

    @property
    def rows(self) -> int:
        """Rows of the datastore: tokens that were added, less the first context_window of each `add`."""
        return 0 if self._store is None else self._store.rows

    @property
    def max_positions(self) -> int:
        """Most tokens that the model sees at once."""
        return self.lm.config.max_positions

    @property
    def datastore(self) -> Datastore:
        """The store. Raises DistlmError without one."""
        if self._store is None:
            raise DistlmError("this KnnLM has no datastore yet: call add(texts) or open(folder) first")
        return self._store

    @property
    def retriever(self) -> Retriever:
        """Store and index. Raises DistlmError without an index of the rows that there are."""
        if self._retriever is None:
            store = self.datastore
            raise DistlmError(
                f'no index of the {store.rows} rows yet: call build_index("Flat") or with another factory'
            )
        return self._retriever

    def add(
        self,
        texts: Text,
        folder: str | Path | None = None,
        *,
        context_window: int = 0,
        block: int | None = None,
        batch_blocks: int = 2,
        rows_per_shard: int = 1_000_000,
        key_dtype: str = "float16",
    ) -> "KnnLM":
        """Store the hidden state before each token of `texts` with that token; itself, for chaining.

        In memory (D numbers of `key_dtype` and 4 bytes a row), after the rows that there are; or in a `folder`, as
        `distlm datastore write` would (datastore.folder=FOLDER reads it): finished shards of an earlier start are
        kept. The texts follow each other; `block` tokens are stored by one pass and see the `context_window` tokens
        before them, too, and the first `context_window` tokens are not stored. `block` None: the pass is, context
        included, as long as the model sees, at most 2 · BLOCK or twice the context. More context makes better keys, and
        context_window = block costs twice the time. An index that was built is dropped.

        Raises DistlmError for texts without tokens, keys that are not finite, a folder with something else and a full
        disk; UsageError where blocks are too long, and for a second store in or beside a folder.
        """
        if key_dtype not in ("float16", "float32"):
            raise UsageError(f"key_dtype={key_dtype!r}: must be 'float16' or 'float32'")
        ids = self.ids(texts)
        block = block or block_lengths(context_window, 0, self.max_positions, 2 * BLOCK)[1]
        plan = plan_store(len(ids), context_window, block, batch_blocks, rows_per_shard, self.max_positions)
        with self._at_work():
            if self._store is not None and (folder is not None or not isinstance(self._store, HeldDatastore)):
                raise UsageError(
                    f"add: there is a datastore already ({self._store.folder}), and one in a folder is written at "
                    "once: give all texts to one add, or make another KnnLM"
                )
            settings = self._settings(ids, plan, context_window, block, key_dtype, folder is not None)
            if isinstance(self._store, HeldDatastore) and self._store.manifest.key_dtype != key_dtype:
                raise UsageError(f"key_dtype={key_dtype!r}: the rows before are {self._store.manifest.key_dtype}")
            if folder is None:
                before = self._store if isinstance(self._store, HeldDatastore) else None
                self._store = hold_store(self.lm, ids, plan, settings, before)
            else:
                write_alone(StoreJob(Path(folder), Path(), ids, plan, settings), self.lm)
                self._store = Datastore.open(Path(folder))
            self._retriever = None
        return self

    def open(self, folder: str | Path) -> "KnnLM":
        """Take the datastore of a folder, of `add` or of a run (RUN/datastore); itself, for chaining.

        Its tap becomes this one's, unless one was given. One block of keys is computed again from the stored tokens.
        Raises DistlmError when there is none, or an unfinished one, and when it is of another tokenizer, tap or model,
        or of blocks that begin otherwise (`begin`);
        UsageError when there is a store already.
        """
        with self._at_work():
            if self._store is not None:
                raise UsageError("open: there is a datastore already; make another KnnLM for another one")
            store = Datastore.open(Path(folder))
            store.require_dictionary(
                self._dictionary_hash, "make the KnnLM with the tokenizer and the line_end that it was written with"
            )
            if self._tap_given and store.tap != self.tap:
                raise DistlmError(
                    f"{folder}: keys are {store.tap}, tap={self.tap!r}; leave the tap out, or give that one"
                )
            self.lm.require_tap(store.tap, f"{folder}: tap")
            self._require_begin(store)
            check_keys(self.lm, store)
            self._store, self.tap = store, store.tap
        return self

    def take(self, retriever: Retriever, mixing: Mixing) -> None:
        """A store that is known to be this model's, how it is searched, and λ, temperature and k."""
        self._store, self._retriever, self.mixing = retriever.datastore, retriever, mixing
        self.tap = retriever.datastore.tap

    def build_index(
        self, factory: str = FLAT, *, exact: bool = True, nprobe: int = 32, sample: int = 1 << 20, seed: int = 1
    ) -> "KnnLM":
        """Make the store searchable; itself, for chaining.

        `factory`: "Flat", every key is compared (exact; the keys as fp32 in memory up to 2 GiB), or a factory string of
        faiss as index.factory takes it, e.g. "IVF64,PQ16"; its lists are scaled down, with a message, where keys are
        few. Of such an index `nprobe` lists are searched, and distances are recomputed from the true keys unless
        `exact` is false. `sample` keys, drawn by `seed`, train it. Raises DistlmError without a store and for a
        factory that is refused.
        """
        store = self.datastore
        if nprobe < 1:
            raise UsageError(f"nprobe={nprobe}: must be at least 1")
        if factory == FLAT:
            self._retriever = Retriever.brute(store)
        else:
            self._retriever = Retriever(store, build_in_memory(store, factory, sample, seed), nprobe, exact)
        return self

    def open_index(self, folder: str | Path, *, exact: bool = True, nprobe: int = 32) -> "KnnLM":
        """Search the index of a folder (RUN/index/NAME), built of this store by `distlm index build`; itself, for
        chaining. Raises DistlmError when it is unfinished or of another store."""
        if nprobe < 1:
            raise UsageError(f"nprobe={nprobe}: must be at least 1")
        self._retriever = Retriever(self.datastore, open_index(Path(folder), self.datastore), nprobe, exact)
        return self

    def log_probs(
        self,
        text: Text,
        *,
        lam: float | None = None,
        temperature: float | None = None,
        k: int | None = None,
        context_window: int | None = None,
        block: int | None = None,
        batch_blocks: int = 2,
    ) -> TokenLogProbs:
        """ln p of each token of a text: under the model, among its neighbours, and under both; fp64 [Q] each.

        Whole lines are packed into blocks of at most `block` tokens, each with up to `context_window` tokens before it
        (knn.block and knn.context_window; None: BLOCK each, or half of what the model sees, or what the other leaves).
        `lam`, `temperature` and `k`: where None those of `mixing`; a `lam` takes the place of its buckets or gate.
        Where the index finds no neighbour p_kNN is 0, and the mixture (1 − λ) p_LM, as in `distlm knn evaluate`.
        Without a store the model's alone. Raises DistlmError for a text without tokens and a store without an index;
        UsageError for values that cannot be.
        """
        scorer = self.scorer(self.mixed(lam, temperature, k))
        with self._at_work():
            found = scorer.tokens(self.ids(text), *self._lengths(context_window, block), batch_blocks)
        return replace(found, tokens=self.pieces(found.tokens))

    def tune(
        self,
        text: Text,
        *,
        lambdas: Sequence[float] = (),
        temperatures: Sequence[float] = (),
        ks: Sequence[int] = (),
        buckets: int = 0,
        context_window: int | None = None,
        block: int | None = None,
        batch_blocks: int = 2,
    ) -> Mixing:
        """Choose λ, temperature and k that are best on a held-out text, and keep them in `mixing`, which is returned.

        The grids of `distlm knn tune` where none are given; so many neighbours are found as the largest of `ks` and k
        of `mixing` say. With `buckets` a λ for each of so many buckets of the nearest distance is fitted as well
        (Drozdov et al. 2022). Memory: 16 · k bytes for each token. Raises as `log_probs`; UsageError
        also for a λ outside [0, 1), a temperature (of squared L2) that is not above 0, a k below 1 and negative
        `buckets`.
        """
        knn = tried(lambdas, temperatures, ks, buckets)
        knn.k = min(max([*ks, self.mixing.k]), self.datastore.rows)
        scorer = self.scorer(replace(self.mixing, k=knn.k))
        with self._at_work():
            blocks = scorer.blocks(self.ids(text), *self._lengths(context_window, block), batch_blocks)
            found = tuned(blocks, knn, buckets)
        # A smaller k than was searched for still is the nearest of the same neighbours.
        self.mixing = replace(found, candidates=self.retriever.candidates(knn.k))
        return self.mixing

    def mixed(self, lam: float | None = None, temperature: float | None = None, k: int | None = None) -> Mixing:
        """`mixing` with these values in place of its own; a `lam` also in place of buckets or gate. Raises UsageError
        for values that cannot be."""
        own = self.mixing
        return Mixing(
            own.lam if lam is None else lam,
            own.temperature if temperature is None else temperature,
            own.k if k is None else k,
            own.candidates,
            own.buckets if lam is None else None,
            own.gate if lam is None else None,
        )

    def scorer(self, mixing: Mixing) -> Scorer:
        """The model and its neighbours over ids of the dictionary; without a store the model alone."""
        retriever = None if self._store is None else self.retriever
        return Scorer(self.lm, self.tap, retriever, mixing, self.max_positions)

    def ids(self, text: Text) -> npt.NDArray[np.int32]:
        """Ids as token files have them, int32 [Q]: of a text line by line, or of the tokenizer's ids, but for the
        beginning-of-text token in front of them, where this model has one in front of each block.

        Raises DistlmError for ids that the tokenizer does not have, and where there are none.
        """
        given = [text] if isinstance(text, str) else list(text)
        if given and isinstance(given[0], str):
            lines = (line for one in given for line in one.removesuffix("\n").split("\n"))
            ids = np.concatenate([encoded.ids for encoded in self.subwords.encode(lines)])
        else:
            pieces = np.array([int(one) for one in given], np.int64)
            if len(pieces) and not 0 <= pieces.min() <= pieces.max() < len(self.subwords.pieces):
                raise DistlmError(f"ids from {pieces.min()} to {pieces.max()}: the tokenizer has those from 0 to "
                                  f"{len(self.subwords.pieces) - 1}")  # fmt: skip
            if self.lm.begins and len(pieces) and pieces[0] == self.lm.config.begin:
                pieces = pieces[1:]
            ids = self.rows_of_pieces(pieces)
        if not len(ids):
            raise DistlmError("there is no token in what was given; give at least one line of text")
        return ids.astype(np.int32)

    def rows_of_pieces(self, pieces: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Ids of the dictionary of the tokenizer's ids, int64, the same shape."""
        wide = np.asarray(pieces, np.int64)
        return np.where(wide == self.subwords.line_end, Dictionary.EOS, wide + FIRST_PIECE)

    def pieces(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The tokenizer's ids of dictionary ids, int64, the same shape; −1 stays."""
        wide = np.asarray(ids, np.int64)
        rows = np.where(wide == Dictionary.EOS, self.subwords.line_end, wide - FIRST_PIECE)
        return np.where(wide < 0, -1, rows)

    def _lengths(self, context_window: int | None, block: int | None) -> tuple[int, int]:
        """(context, scored) tokens of a pass where one of them, or both, are left open."""
        half = min(BLOCK, self.max_positions // 2)
        if context_window is None:
            block = block or half
            return max(0, min(half, self.max_positions - block)), block
        return context_window, block or max(1, min(half, self.max_positions - context_window))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """No dropout, and afterwards no trace of the block on the model."""
        with evaluating(self.model):
            try:
                yield
            finally:
                self.lm.unhook()

    @property
    def _dictionary_hash(self) -> str:
        return self.subwords.dictionary(np.zeros(self.subwords.size, np.int64)).hash

    def _settings(
        self, ids: npt.NDArray[np.int32], plan: StorePlan, context_window: int, block: int, key_dtype: str, kept: bool
    ) -> Settings:
        dictionary = self._dictionary_hash
        facts = {"dictionary": dictionary, "splits": {"train": [len(ids), bytes_hash(ids.tobytes())]}}
        return Settings(
            split="train", tap=self.tap, context_window=context_window, block=block, batch_blocks=plan.batch_blocks,
            rows_per_shard=plan.rows_per_shard, key_dtype=key_dtype, width=self.lm.width,
            vocabulary=self.subwords.size, model=parameters_hash(self.lm) if kept else "", dictionary=dictionary,
            tokens=json_hash(facts), begins=self.lm.begins,
        )  # fmt: skip

    def _require_begin(self, store: Datastore) -> None:
        """Raises DistlmError for a store whose blocks begin otherwise than this model's."""
        if (there := bool(store.manifest.context.begins)) != self.lm.begins:
            own = self.subwords.pieces[self.lm.config.begin] if self.lm.begins else ""
            mend = "begin='none'" if own else "begin=PIECE, the piece that it was written with"
            raise DistlmError(
                f"{store.folder}: each block was written with{'' if there else 'out'} a beginning-of-text token in "
                f"front, and this KnnLM has {repr(own) if own else 'none'}; make it with {mend}, or write the store "
                "again"
            )


def _library_tokenizer(tokenizer: Any) -> Any:
    """A copy, as an object of the `tokenizers` library."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DistlmError(f"KnnLM needs tokenizers: {install('hf')} ({error})") from error
    found = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(found, Tokenizer):
        raise DistlmError(
            f"tokenizer: a {type(tokenizer).__name__} has no tokenizer.json; give a fast one "
            "(AutoTokenizer.from_pretrained(NAME, use_fast=True)) or one of the tokenizers library"
        )
    return Tokenizer.from_str(found.to_str())
