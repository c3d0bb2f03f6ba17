"""`distlm generate`: one prompt continued without and with neighbours, from a run directory."""

from dataclasses import dataclass

from distlm.data.dictionary import Dictionary
from distlm.data.text.shown import JOINED
from distlm.errors import DistlmError, UsageError
from distlm.knnlm.evaluate.belonging import frozen_for
from distlm.knnlm.evaluate.parts import Frozen
from distlm.knnlm.generate.words import Generator, Retrieved, Sampling, Word
from distlm.knnlm.search.forward import open_forward
from distlm.knnlm.search.source import Source, open_source
from distlm.runtime.stage import Stage


@dataclass(frozen=True)
class Generation:
    """What was asked for and what came of it."""

    name: str
    """Of the run."""
    prompt: str
    """In one line."""
    unknown: list[str]
    """Words of the prompt that the dictionary does not hold; the model sees <unk>. None of sub-words."""
    alone: list[Word]
    """The language model's own continuation."""
    alone_text: str
    """The same as text, in one line."""
    mixed: list[Word]
    """The kNN-LM's; empty without neighbours."""
    mixed_text: str
    sampling: Sampling
    frozen: Frozen | None
    """λ, temperature and k; None without neighbours."""


def run_generate(stage: Stage, prompt: str, sampling: Sampling, lm_only: bool) -> Generation:
    """Continue `prompt`: words between spaces as in the token files, or, where these hold sub-words, text as written.

    Raises UsageError for impossible numbers, DistlmError when λ, temperature and k are not tuned yet or are of another
    store, when a file that is read is not as it was written, and what open_source raises.
    """
    _check(sampling)
    config, run = stage.config, stage.run
    if not lm_only and not run.tuned.exists():
        raise DistlmError(f"{run.tuned}: λ, temperature and k are not chosen yet; run `distlm knn tune`, or --lm-only")
    forward = open_forward(stage) if lm_only else open_source(stage)
    frozen = frozen_for(run, forward.datastore) if isinstance(forward, Source) else None
    own = [(forward.tokens.folder, forward.tokens.written_words())]
    for root, files in forward.written([], run.index) if isinstance(forward, Source) else own:
        stage.require_whole(root, files, alone=True)
    generator = Generator(forward)
    shown = generator.shown
    ids = shown.encode(prompt)
    unknown = [word for word in prompt.split() if word != "<unk>" and shown.encode(word) == [Dictionary.UNK]]
    words = " ".join(prompt.split()) if shown.by_word else shown.line(ids)

    def text(made: list[Word]) -> str:
        return JOINED * made[0].hangs + shown.line([word.token for word in made], ids).lstrip(" ")

    alone = generator.run(ids, sampling)
    if frozen is None:
        return Generation(config.name, words, unknown, alone, text(alone), [], "", sampling, None)
    mixed = Generator(forward, frozen).run(ids, sampling)
    return Generation(config.name, words, unknown, alone, text(alone), mixed, text(mixed), sampling, frozen)


def generation_text(made: Generation) -> str:
    """The two texts, and every word of the second with its probabilities and its heaviest contexts."""
    lines = [f"prompt  {made.prompt}", f"LM      {made.alone_text}"]
    if made.unknown:
        lines.append(f"<unk>   not in the dictionary: {' '.join(made.unknown)}")
    frozen = made.frozen
    if not made.mixed or frozen is None:
        return "\n".join(lines)
    lines += [
        f"kNN-LM  {made.mixed_text}",
        "",
        f"λ={frozen.weight:g}, T={frozen.temperature:g}, k={frozen.k}; each word with its probability, "
        "that of the LM, that among the neighbours, and some of them (* the same word):",
    ]
    for word in made.mixed:
        among = "no neighbours" if word.p_knn is None else f"kNN {word.p_knn:.4f}"
        lines.append(f"{marked(word)}  p {word.p:.4f}  LM {word.p_lm:.4f}  {among}")
        for near in word.neighbours:
            mark = "*" if near.hit else " "
            lines.append(f"  {mark} {near.weight:7.2%}  d={near.distance:<9.4g} {near.context} [{marked(near)}]")
    return "\n".join(lines)


def marked(word: Word | Retrieved) -> str:
    """A token alone, with the mark of pieces that hang on what is before them."""
    return JOINED * word.hangs + word.word


def _check(sampling: Sampling) -> None:
    for flag, value, least in (
        ("--tokens", sampling.tokens, 1), ("--neighbours", sampling.shown, 0), ("--context", sampling.context, 0),
        ("--seed", sampling.seed, 0),
    ):  # fmt: skip
        if value < least:
            raise UsageError(f"{flag} {value}: must be at least {least}")
    if not 0 < sampling.top_p <= 1:
        raise UsageError(f"--top-p {sampling.top_p}: must be above 0 and at most 1")
