"""What training a causal language model of Hugging Face will need."""

from dataclasses import replace

from distlm.models.described import parameter_count
from distlm.models.hf.config import HfRun
from distlm.models.hf.memory import with_memory
from distlm.models.hf.model import hf_model
from distlm.runtime.plan import StagePlan
from distlm.training.blocks.plan import Corpus, Shape, plan_blocks_training
from distlm.training.memory.plan import plan_memories


def plan_hf(config: HfRun, ranks: int) -> StagePlan:
    """Needs of training at a rank count; see plan_blocks_training."""
    model = with_memory(hf_model(config.hf.name), config.memory, config.train.seed)
    corpus = Corpus.of(config, config.data.max_words or 40_000)
    parameters = parameter_count(model, corpus.vocabulary)
    dense = parameter_count(replace(model, memory={}), corpus.vocabulary)
    # The layers are counted by what they hold; a tied softmax is counted once.
    layers = max(1, round((dense - model.rows * model.width) / (12 * model.width**2)))
    shape = Shape(parameters, layers, 4 * model.width, model.rows, 6 * dense)
    return plan_blocks_training(
        config, model, corpus, shape, ranks, plan_memories(config, model, 4 * model.width, ranks)
    )
