"""What training a transformer will need."""

from dataclasses import replace

from distlm.models.described import has_memory, largest_parameter, model_of, parameter_count
from distlm.models.transformer.config import TransformerConfig, TransformerRun
from distlm.models.transformer.regularisers.tables import table_bytes, uses_queues
from distlm.runtime.files import format_bytes
from distlm.runtime.plan import StagePlan
from distlm.training.blocks.plan import Corpus, Further, Shape, plan_blocks_training
from distlm.training.memory.plan import plan_memories


def plan_transformer(config: TransformerRun, ranks: int) -> StagePlan:
    """Needs of training at a rank count; see plan_blocks_training."""
    model = model_of(config)
    assert isinstance(model, TransformerConfig)
    corpus = Corpus.of(config)
    parameters = parameter_count(model, corpus.vocabulary)
    head = min([edge for edge in model.cutoffs if edge < corpus.vocabulary] or [corpus.vocabulary])
    flops = 6 * ((4 * model.width**2 + 2 * model.width * model.ffn_width) * model.layers + model.width * head)
    largest = largest_parameter(model, corpus.vocabulary)
    shape = Shape(parameters, largest, model.layers, model.ffn_width, head, flops)
    # Memories and queues exclude each other.
    further = (
        plan_memories(config, model, model.ffn_width, ranks)
        if has_memory(model)
        else _queues(config, corpus.vocabulary, parameters, ranks)
    )
    if not corpus.tokens:
        assumed = f"no token files yet: a vocabulary of {corpus.vocabulary} is assumed"
        further = replace(further, notes=(assumed, *further.notes))
    return plan_blocks_training(config, model, corpus, shape, ranks, further)


def _queues(config: TransformerRun, vocabulary: int, parameters: int, ranks: int) -> Further:
    """Queues of words and the momentum encoder, where eq. 1 of Ton et al. is asked for."""
    train, width = config.train, config.model.width
    if not uses_queues(train):
        return Further()
    tables, encoder = table_bytes(train.regulariser, vocabulary, width, train.queue_length, ranks), 4 * parameters
    form = f"{train.queue_length} x " if train.regulariser == "queue" else ""
    note = (
        f"train.regulariser={train.regulariser}: {vocabulary} words x {form}{width} x 4 bytes / {ranks} ranks = "
        f"{format_bytes(tables)} a rank, and a momentum encoder of {format_bytes(encoder)} on every rank; one more "
        "forward pass"
    )
    # The encoder's forward pass is a third of forward and backward.
    return Further(tables, encoder, 4 / 3, (note,))
