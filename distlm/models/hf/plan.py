"""What training a causal language model of Hugging Face, or taking it as it is, will need."""

from dataclasses import replace

from distlm.config.training import BlocksConfig
from distlm.data.estimate import expected_tokens
from distlm.models.described import causal_kind, largest_parameter, parameter_count
from distlm.models.hf.config import HfRun
from distlm.models.hf.memory import with_memory
from distlm.models.hf.model import hf_model
from distlm.runtime.plan import StagePlan, machine_flops
from distlm.training.blocks.plan import Corpus, Shape, plan_blocks_training
from distlm.training.memory.plan import plan_memories

_BASE_MEMORY = 500_000_000
"""Python with torch and transformers."""


def plan_hf(config: HfRun, ranks: int) -> StagePlan:
    """Needs of training at a rank count, see plan_blocks_training; with train.updates=0 of the import."""
    if not config.section(BlocksConfig).updates:
        return plan_import(config)
    model = with_memory(hf_model(config.hf.name), config.memory, config.train.seed)
    corpus = Corpus.of(config)
    parameters = parameter_count(model, corpus.vocabulary)
    dense = parameter_count(replace(model, memory={}), corpus.vocabulary)
    # The layers are counted by what they hold; a tied softmax is counted once.
    layers = max(1, round((dense - model.rows * model.width) / (12 * model.width**2)))
    largest = largest_parameter(model, corpus.vocabulary)
    shape = Shape(parameters, largest, layers, 4 * model.width, model.rows, 6 * dense)
    further = plan_memories(config, model, 4 * model.width, ranks)
    return plan_blocks_training(config, model, corpus, shape, ranks, further)


def plan_import(config: HfRun) -> StagePlan:
    """Needs of taking hf.name as it is: its weights are written once and read again for the loss on valid."""
    model, train = hf_model(config.hf.name), config.section(BlocksConfig)
    causal_kind(model).require_tap(model, train.tap, "train.tap")
    expected = expected_tokens(config)
    parameters, tokens = parameter_count(model, 0), expected.tokens.get("valid", 0)
    # Half of each pass is context, as in validation while training.
    seconds = 2 * tokens * 2.0 * (parameters + model.rows * model.width) / machine_flops() if tokens else None
    activations = 4 * train.micro_blocks * train.tokens_per_sample * 12 * model.width
    return StagePlan(
        "train",
        f"import of hf.name={config.hf.name} as it is (train.updates=0), {parameters / 1e6:.1f} M parameters, and its "
        f"loss on {tokens or 'unknown'} tokens of valid",
        4 * parameters,
        _BASE_MEMORY + 2 * 4 * parameters + activations,
        seconds,
        ["one rank works, the others wait", *expected.note],
    )
