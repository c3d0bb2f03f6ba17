"""What training in blocks of tokens will need: updates, tokens, disk, memory, time."""

from dataclasses import dataclass

from distlm.config.schema import RunConfig
from distlm.config.training import BlocksConfig
from distlm.data.estimate import expected_tokens
from distlm.memory.config import MemoryConfig
from distlm.models.described import causal_kind
from distlm.models.kind import CausalDescription
from distlm.models.registry import kind
from distlm.runtime.plan import StagePlan, rank_flops
from distlm.training.dsconfig import described, load_ds_config
from distlm.training.memory_need import states_memory, training_peak
from distlm.training.microbatch import MicroBatchPlan, plan_micro_batches, plan_pieces


def memory_section(config: RunConfig) -> MemoryConfig | None:
    """The section memory of a run whose model has one; None: it has none."""
    found = getattr(config, "memory", None)
    return found if isinstance(found, MemoryConfig) and found.kind != "none" else None


def plan_blocks_cut(config: RunConfig, ranks: int) -> MicroBatchPlan:
    """An update's micro-batches: each of one rank, or with a memory of all of them. Raises UsageError or DistlmError,
    with what would do, when they do not divide over the ranks."""
    train = config.section(BlocksConfig)
    memory = memory_section(config)
    if memory is None:
        return plan_micro_batches(train, ranks)
    return plan_pieces(train, ranks, f"with memory.kind={memory.kind} a")


@dataclass(frozen=True)
class Corpus:
    """What a plan must know of token files that may not be there yet."""

    vocabulary: int
    tokens: int
    """Of train; 0: not known."""
    exact: bool = True
    """Counted, not estimated from the text."""
    valid: int = 0
    """Tokens of the validation split; 0: not known."""

    @staticmethod
    def of(config: RunConfig) -> "Corpus":
        """Of a run's token files, else of its text with the words that its kind assumes."""
        found = expected_tokens(config)
        words = found.words or kind(config.model.kind).assumed_words(config)
        return Corpus(words, found.tokens.get("train", 0), found.exact, found.tokens.get("valid", 0))


@dataclass(frozen=True)
class Shape:
    """What a model costs in training."""

    parameters: int
    largest: int
    """Elements of the largest parameter."""
    layers: int
    inner: int
    """Width of the feed-forward layers."""
    head: int
    """Softmax classes that a token's target is scored against."""
    flops: float
    """FLOP per token, forward and backward, without attention."""


@dataclass(frozen=True)
class Further:
    """What a regulariser or memories need on top."""

    rank_bytes: int = 0
    """On each rank, its own."""
    every_rank_bytes: int = 0
    """The same on every rank."""
    passes: float = 1.0
    """Time of an update with it over that without."""
    notes: tuple[str, ...] = ()
    memory_bytes: int = 0
    """On each rank in training, not in a checkpoint."""
    disk_bytes: int = 0
    """In a checkpoint, not on a rank."""
    flops: float = 0.0
    """FLOP per token beside those of the shape."""


def plan_blocks_training(
    config: RunConfig, model: CausalDescription, corpus: Corpus, shape: Shape, ranks: int, further: Further
) -> StagePlan:
    """Needs of training at a rank count.

    Time counts 6 FLOP per parameter and token (Kaplan et al. 2020) plus attention, and 6·D·c for the c softmax
    classes a token's target is scored against; a third of it for each token of a validation. The rate is this
    machine's CPU, so on a GPU it is an upper bound.
    Raises DistlmError for a batch that does not divide over the ranks and for a bad train.deepspeed.
    """
    train, parameters, layers = config.section(BlocksConfig), shape.parameters, shape.layers
    causal_kind(model).require_tap(model, train.tap, "train.tap")
    micro = plan_blocks_cut(config, ranks)
    deepspeed = load_ds_config(train.deepspeed)
    seen = train.updates * train.blocks_per_update * train.tokens_per_sample
    notes = [f"{seen / corpus.tokens:.1f} passes over {corpus.tokens} tokens"] if corpus.tokens else []
    notes += further.notes
    states = 2 if train.optimizer == "adam" else 1
    checkpoint = 4 * parameters * (1 + states) + further.rank_bytes * ranks + further.every_rank_bytes
    checkpoint += further.disk_bytes
    per_token = shape.flops + further.flops + 6 * layers * train.tokens_per_sample * model.width
    # In half blocks, each with as much context.
    validated = 2 * corpus.valid * (-(-train.updates // train.valid_every) if train.valid_every else 1)
    flops = (seen * further.passes + validated / 3) * per_token
    seconds = flops / (rank_flops(config.launch.threads, ranks) * ranks)
    held = states_memory(parameters, shape.largest, states, train.precision, deepspeed, ranks)
    beside = further.rank_bytes + further.every_rank_bytes + further.memory_bytes
    widths = layers * (10 * model.width + 2 * shape.inner) + 3 * shape.head
    # Of a rank: with a memory a part of the micro-batch.
    activations = 4 * micro.micro_blocks * train.tokens_per_sample * widths
    peak = training_peak(held, beside, activations)
    if train.precision == "fp16":
        notes.append("fp16 with loss scaling: the way on V100, which has no bf16")
    return StagePlan(
        "train",
        f"{train.updates} updates of {train.blocks_per_update} blocks x {train.tokens_per_sample} tokens "
        f"({seen / 1e6:.1f} M tokens), {parameters / 1e6:.1f} M parameters, {micro.accumulation} micro-batches per "
        f"rank and update, {described(deepspeed)}",
        # One more while the newest is written, one for the best.
        checkpoint * (train.keep_last + 2),
        peak.memory,
        seconds,
        notes,
        device_bytes=peak.device,
        host_bytes=peak.host,
    )
