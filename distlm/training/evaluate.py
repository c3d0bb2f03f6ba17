"""The stage `distlm evaluate`: perplexity of a model without neighbours, each kind of model in its own way.

Here is what kinds that predict the next word share, and the way of those that are given blocks: those of
`distlm knn search`.
"""

import time
from collections.abc import Callable

from distlm.config.schema import RunConfig
from distlm.config.training import BlocksConfig
from distlm.data.estimate import expected_tokens
from distlm.data.tokens import TokenFiles
from distlm.memory.of_model import Memories, layers_and_values
from distlm.models.card import model_fingerprint
from distlm.models.complete import memory_files
from distlm.models.described import causal, model_of, parameter_count, value_bytes
from distlm.models.io import card_parameters, check_dictionary, load_model
from distlm.models.language_model import LanguageModel
from distlm.models.perplexity import perplexity
from distlm.models.registry import kind
from distlm.runtime.metrics import STAGE_SECONDS
from distlm.runtime.plan import StagePlan, machine_flops
from distlm.runtime.progress import say
from distlm.runtime.ranks.collective import rank0_first
from distlm.runtime.ranks.device import default_device
from distlm.runtime.rundir import code_version
from distlm.runtime.stage import Stage
from distlm.training.finished import RESULT
from distlm.training.memory.measure import measured, staleness_of, use_words
from distlm.training.memory.objective import objective_of
from distlm.training.records import LmModel, LmResults, LmSplit
from distlm.training.validate import Validator

COUNTED = "every token scored once, </s> and <unk> included"
Score = Callable[[LanguageModel, TokenFiles, str], tuple[float, str]]
"""(model, token files, split) → nats per token, and the context rule."""


def run_evaluate(stage: Stage) -> dict[str, float]:
    """RUN/lm.json; name of a text → perplexity. Collective."""
    return kind(stage.config.model.kind).evaluate(stage)


def plan_evaluate(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of it."""
    return kind(config.model.kind).plan_evaluate(config, ranks)


def evaluate_in_blocks(stage: Stage) -> dict[str, float]:
    """Perplexity per word of every split of knn.splits, in the blocks of knn.*; see evaluate_splits."""
    knn, tap = stage.config.knn, stage.config.section(BlocksConfig).tap

    def score(model: LanguageModel, tokens: TokenFiles, split: str) -> tuple[float, str]:
        validator = Validator(tokens, split, knn.context_window, knn.block, knn.batch_blocks, model.begins)
        device = next(model.parameters()).device
        loss = validator.run_alone(objective_of(model, tap).eval(), device).loss
        return loss, f"{validator.rule}; {COUNTED}"

    return evaluate_splits(stage, score)


def evaluate_splits(stage: Stage, score: Score) -> dict[str, float]:
    """Perplexity per word of every split of knn.splits under the best checkpoint; RUN/lm.json.

    The input before a split's first token is </s>. Rank 0 works. Returns SPLIT → perplexity, and seconds. Raises
    DistlmError for a model of another dictionary, and for blocks that are too long.
    """
    return rank0_first(stage.comm, lambda: _evaluate(stage, score))


def _evaluate(stage: Stage, score: Score) -> dict[str, float]:
    began, run = time.monotonic(), stage.run
    checkpoint = run.model_checkpoint(stage.config)
    model, card = load_model(checkpoint, default_device())
    tokens = TokenFiles.open(run.tokens(stage.config))
    check_dictionary(card, tokens.dictionary)
    stage.require_whole(tokens.folder, tokens.written(*stage.config.knn.splits), alone=True)
    memories: Memories = getattr(model, "memories", {})
    splits: dict[str, LmSplit] = {}
    rule = ""
    for split in stage.config.knn.splits:
        with measured(memories) as used:
            loss, rule = score(model, tokens, split)
        per_word = perplexity(loss * tokens.tokens_per_word(split))
        found = LmSplit(tokens=len(tokens.split(split)), loss_nats=loss, perplexity=per_word)
        if memories:
            found.memory = {str(layer): usage.counts().measures() for layer, usage in used.items()}
        if tokens.tokenizer:
            found.words, found.token_perplexity = tokens.words(split), perplexity(loss)
        splits[split] = found
        say(f"evaluate: {split}: loss {loss:.4f}, ppl {per_word:.2f} per word ({rule}){use_words(found)}")
    results = LmResults(
        name=stage.config.name,
        splits=splits,
        context_rule=rule,
        model=LmModel(
            kind=card.kind, parameters=card_parameters(card), fingerprint=model_fingerprint(checkpoint),
            step=card.step, checkpoint=str(checkpoint),
        ),
        tokens=tokens.fingerprint,
        code=code_version(),
    )  # fmt: skip
    if memories:
        results.model.memory_values = layers_and_values(card.config["memory"], model.width)[1]
        results.model.memory_files = memory_files(checkpoint)
        results.staleness = staleness_of(memories, card.step or 0)
    seconds = time.monotonic() - began
    run.metrics.write("evaluate", {STAGE_SECONDS: round(seconds, 3)})
    results.write(run.root / RESULT)
    return {"seconds": seconds, **{split: result.perplexity for split, result in splits.items()}}


def plan_blocks(config: RunConfig) -> StagePlan:
    """Needs of evaluate_in_blocks."""
    return plan_tokens(config, 1 + config.knn.context_window / config.knn.block)


def plan_tokens(config: RunConfig, passes: float) -> StagePlan:
    """Needs of an evaluation in which each token goes through the model `passes` times: 2 FLOP per parameter."""
    expected = expected_tokens(config)
    vocabulary = expected.words or kind(config.model.kind).assumed_words(config)
    count = sum(expected.tokens.get(split, 0) for split in config.knn.splits)
    model = causal(model_of(config))
    parameters = parameter_count(model, vocabulary)
    count = round(count * passes)
    seconds = count * 2.0 * parameters / machine_flops() if count else None
    work = f"{count or 'unknown'} tokens of {', '.join(config.knn.splits)}, context included"
    notes = ["one rank works, the others wait", *expected.note]
    return StagePlan("evaluate", work, 0, 8 * parameters + value_bytes(model), seconds, notes)
