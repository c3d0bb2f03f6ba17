"""A finished run as something that scores text, read and nothing written; and the same of a KnnLM."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distlm.config.load import load_config
from distlm.config.schema import RunConfig
from distlm.data.subwords import Subwords
from distlm.data.tokens import TokenFiles
from distlm.errors import DistlmError, UsageError
from distlm.integrations.gated import GatedWeights
from distlm.integrations.knn_lm import BLOCK, KnnLM
from distlm.integrations.mixture import GATE_ELSEWHERE, Mixing
from distlm.integrations.retrieve import Retriever
from distlm.integrations.scorer import Ids, Scorer
from distlm.integrations.text import Codec, Pieces, Words
from distlm.knnlm.generate.growing import Growing
from distlm.knnlm.search.forward import open_forward
from distlm.knnlm.search.source import open_source
from distlm.knnlm.tune.buckets import Buckets
from distlm.knnlm.tune.gate import Gate, log_counts
from distlm.knnlm.tune.records import Tuned
from distlm.models.hf.model import HfLM
from distlm.runtime.ranks.comm import SingleComm
from distlm.runtime.ranks.world import resolve_world
from distlm.runtime.records import given
from distlm.runtime.rundir import RunDir
from distlm.runtime.stage import Stage
from distlm.runtime.stop import StopFlag

MIXTURES = ("lm", "knn", "knn_buckets")
"""The language model alone; with its neighbours at one λ; with a λ for each bucket of the nearest distance. As in
results.json."""


@dataclass(frozen=True)
class TextScorer:
    """Log-probabilities and continuations of text."""

    scorer: Scorer
    codec: Codec
    context_window: int
    """knn.context_window, tokens."""
    block: int
    """knn.block, tokens."""
    batch_blocks: int
    """knn.batch_blocks."""

    def log_prob(self, text: str) -> float:
        """Σ ln p of the tokens of a text, by the rule of `distlm knn evaluate`: the same number where the text ends
        with a newline; otherwise its last line has no </s>. 0 for a text without tokens."""
        ids = self.codec.encode(text)
        if not len(ids):
            return 0.0
        return float(self.scorer.tokens(ids, self.context_window, self.block, self.batch_blocks).mixture.sum())

    def continuations(self, pairs: Sequence[tuple[str, str]], batch: int) -> list[tuple[float, bool]]:
        """(Σ ln p of the second text after the first, whether each of its tokens is the most probable one) of each.

        Spaces at the end of the first belong to the second, whose tokens are those that the first has not in the two
        together. (0, True) for no tokens.
        """
        cut: list[tuple[Ids, Ids]] = []
        for context, continuation in pairs:
            kept = context.rstrip(" ")
            before = self.codec.encode(kept)
            cut.append((before, self.codec.encode(context + continuation)[len(before) :]))
        some = [place for place, (_, ids) in enumerate(cut) if len(ids)]
        found = dict(zip(some, self.scorer.continuations([cut[place] for place in some], batch), strict=True))
        return [found.get(place, (0.0, True)) for place in range(len(cut))]

    def generate(
        self, prompt: str, until: Sequence[str], tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> str:  # fmt: skip
        """The text that follows `prompt`, of at most `tokens` tokens, up to the first of `until`, which is left out, or
        to a special token of the tokenizer, e.g. its end of a text.

        The most probable token each time; with a `temperature` above 0 one drawn from softmax(ln p / temperature).
        A model that can keep its attention's keys and values computes one state a step; others the whole text.
        """
        ids = self.codec.encode(prompt).tolist()
        start = len(self.codec.decode(ids))
        random = torch.Generator().manual_seed(seed)
        text, passed = "", Growing(self.scorer.model)
        for _ in range(tokens):
            scores = self.scorer.next_word(ids, passed).cpu()
            if temperature > 0:
                token = int(torch.multinomial(torch.softmax(scores / temperature, 0), 1, generator=random))
            else:
                token = int(scores.argmax())
            if self.codec.ends(token):
                return text
            ids.append(token)
            text = self.codec.decode(ids)[start:]
            ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text


def of_run(run: str | Path, mixture: str = "knn", settings: Sequence[str] = ()) -> TextScorer:
    """A finished run of any kind that predicts the next word, with the frozen settings of its knn.json.

    `settings` are KEY=VALUE as on the command line, e.g. of another question that was tuned. Raises UsageError for an
    unknown mixture, DistlmError when there is no such run, nothing was tuned, or its parts do not belong together.
    """
    if mixture not in MIXTURES:
        raise UsageError(f"mixture={mixture!r}: choose one of {', '.join(MIXTURES)}")
    config = load_config(str(run), list(settings))
    stage = _reading(config)
    knn = config.knn
    if mixture == "lm":
        forward = open_forward(stage)
        scorer = Scorer(forward.model, config.datastore.tap, None, Mixing(0.0), forward.longest, knn.carry)
        return TextScorer(scorer, _codec(forward.tokens), knn.context_window, knn.block, knn.batch_blocks)
    if knn.similarity != "l2":
        raise DistlmError(f"knn.similarity={knn.similarity}: only squared L2 is read here; choose mixture=lm")
    if not stage.run.tuned.exists():
        raise DistlmError(f"{stage.run.tuned}: λ, temperature and k are not chosen yet; run `distlm knn tune`, or "
                          "choose mixture=lm")  # fmt: skip
    tuned, source = Tuned.read(stage.run.tuned), open_source(stage)
    if tuned.datastore != source.datastore.fingerprint:
        raise DistlmError(
            f"{stage.run.tuned}: tuned on another datastore than {source.datastore.folder}; run `distlm knn search` "
            "and `distlm knn tune` again"
        )
    buckets = None
    if mixture == "knn_buckets":
        if not tuned.buckets:
            raise DistlmError(f"{stage.run.tuned}: no buckets; set knn.buckets and run `distlm knn tune` again, or "
                              "choose mixture=knn")  # fmt: skip
        buckets = Buckets.of(tuned.buckets)
    if source.index is None:
        retriever = Retriever.brute(source.datastore)
    else:
        retriever = Retriever(source.datastore, source.index, knn.nprobe, knn.distances == "exact")
    mixing = Mixing(given(tuned.weight), given(tuned.temperature), given(tuned.k), source.candidates, buckets)
    scorer = Scorer(source.model, source.datastore.tap, retriever, mixing, source.longest, knn.carry)
    return TextScorer(scorer, _codec(source.tokens), knn.context_window, knn.block, knn.batch_blocks)


def of_knn_lm(knn: KnnLM, mixture: str = "") -> TextScorer:
    """A KnnLM with its `mixing`. `mixture` as of_run; empty: what there is.

    Raises UsageError for an unknown mixture and for a model in training mode, DistlmError for what there is not.
    """
    if mixture and mixture not in MIXTURES:
        raise UsageError(f"mixture={mixture!r}: choose one of {', '.join(MIXTURES)}")
    if knn.model.training:
        raise UsageError("the model of this KnnLM is in training mode, where dropout is at work: call model.eval()")
    half = min(BLOCK, knn.max_positions // 2)
    scorer = Scorer(knn.lm, knn.tap, None, Mixing(0.0), knn.max_positions)
    if mixture != "lm" and (mixture or knn.rows):
        mixing = knn.mixed(lam=knn.mixing.lam) if mixture == "knn" else knn.mixing
        if mixing.gate is not None and not mixture:
            raise UsageError(GATE_ELSEWHERE)
        if mixture == "knn_buckets":
            mixing = replace(mixing, gate=None)
        if mixture == "knn_buckets" and mixing.buckets is None:
            raise DistlmError("mixture='knn_buckets': this KnnLM has no buckets; call tune(text, buckets=64) first")
        scorer = Scorer(knn.lm, knn.tap, knn.retriever, mixing, knn.max_positions)
    return TextScorer(scorer, Pieces(knn.subwords), half, half, 2)


def knn_lm_of_run(run: str | Path, settings: Sequence[str] = (), mixture: str = "", skip: float = 0.0) -> KnnLM:
    """KnnLM.of_run."""
    if mixture not in ("", "knn", "knn_buckets", "gate"):
        raise UsageError(f"mixture={mixture!r}: choose one of knn, knn_buckets, gate")
    if skip and mixture != "gate":
        raise UsageError(f"skip={skip}: searches are left out by the gate; add mixture='gate'")
    found = of_run(run, "knn_buckets" if mixture == "knn_buckets" else "knn", settings)
    model = found.scorer.model
    if not isinstance(model, HfLM) or not isinstance(found.codec, Pieces):
        raise DistlmError(f"{run}: not a run with model.kind=hf; its text goes on with `distlm generate`")
    subwords = found.codec.subwords
    begin = subwords.pieces[model.config.begin] if model.begins else "none"
    knn = KnnLM(model.hf, subwords.tokenizer, found.scorer.tap, subwords.pieces[subwords.line_end], begin)
    assert found.scorer.retriever is not None
    config = load_config(str(run), list(settings))
    path = RunDir.of(config).tuned
    tuned, mixing = Tuned.read(path), found.scorer.mixing
    if mixture == "gate":
        if not tuned.gate:
            raise DistlmError(f"{path}: no gate; set knn.gate=true and run `distlm knn tune` again, or choose "
                              "mixture='knn'")  # fmt: skip
        counts = log_counts(TokenFiles.open(RunDir.of(config).tokens(config)).dictionary)
        mixing = replace(mixing, gate=GatedWeights(Gate.of(tuned.gate), counts, skip))
    if mixture in ("", "gate") and tuned.buckets:
        # Beside a gate they are not read, but for lm_eval.
        mixing = replace(mixing, buckets=Buckets.of(tuned.buckets))
    knn.take(found.scorer.retriever, mixing)
    return knn


def _reading(config: RunConfig) -> Stage:
    """What reads a run's files, without claiming its folder."""
    return Stage("read", config, resolve_world(), SingleComm(), StopFlag(0), RunDir.of(config))


def _codec(tokens: TokenFiles) -> Codec:
    if tokens.tokenizer is None:
        return Words(tokens.dictionary)
    return Pieces(Subwords.load(str(tokens.folder), tokens.tokenizer.line_end_piece))
