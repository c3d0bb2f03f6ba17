"""What training and evaluation write: the state in a checkpoint, and the perplexities of lm.json."""

from typing import Any, ClassVar, TypeVar

from msgspec import UNSET, UnsetType

from distlm.config.schema import TrainConfig
from distlm.memory.records import MemoryUse
from distlm.runtime.records import CodeVersion, Part, Record

S = TypeVar("S", bound="TrainState")
Number = int | float | None


class OptimizerState(Part, kw_only=True):
    """The optimizer's plain numbers; its tensors are in optimizer.safetensors."""

    keys: list[str]
    """Names of its tensors for each parameter, e.g. exp_avg."""
    average: str | None = None
    """Which of them is the model to be used; null: the weights themselves are."""
    state: dict[str, Number]
    """Numbers of each parameter, e.g. step; the same for all."""
    group: dict[str, Number]
    """Numbers of the optimizer, e.g. lr_old."""
    scaler: dict[str, Number]
    """Numbers of the fp16 loss scaler."""

    @staticmethod
    def fresh() -> "OptimizerState":
        """Before the first step."""
        return OptimizerState(keys=[], state={}, group={}, scaler={})


class UpdateSums(Part):
    """One update since the last line of metrics."""

    ce: float
    """Σ cross entropy, in nats."""
    others: dict[str, float]
    """Metric → its sum over the tokens."""
    tokens: int
    """Tokens, of all ranks."""


class ValueSums(Part):
    """What an update did to the values of the memories; a number for each memory."""

    rows: list[int]
    """Slots that were read."""
    norms: list[float]
    """2-norm of the gradient before clipping."""


class Window(Part, kw_only=True):
    """The updates since the last line of metrics, so that its means go on over a stop."""

    updates: list[UpdateSums]
    """In order."""
    seconds: float
    """Seconds that they took, without validation and saving."""
    values: list[ValueSums] | UnsetType = UNSET
    """The same updates of the memories' values, those skipped left out; absent without memory."""
    sent: list[int] | UnsetType = UNSET
    """Bytes that rank 0 sent for the memories in each update; absent without memory."""


class Best(Part):
    """The checkpoint with the lowest validation loss."""

    checkpoint: str
    """Its folder below RUN/checkpoints."""
    valid_loss: float
    """Its validation loss in nats per token."""


class TrainState(Record, kw_only=True):
    """Where a training is: what the loop goes on from, for every kind of model; a kind may have more."""

    FILE = "RUN/checkpoints/step-NNNNNNNN/state.json"
    WHAT = "state of a checkpoint"
    WRITER = "distlm train"
    READERS = ("distlm train",)
    MEND = "delete that checkpoint to continue from the one before it"
    IDENTITY: ClassVar[tuple[str, ...]] = ("data", "dictionary", "seed")
    """Fields that a checkpoint must share with the run that continues it."""

    data: str
    """Fingerprint of the text that it is trained on."""
    dictionary: str
    """Hash of the dictionary or tokenizer."""
    seed: int
    """train.seed."""
    update: int
    """Updates done; the next one says which data comes next."""
    skipped: int = 0
    """Updates that left the weights alone (fp16)."""
    fingerprint: str = ""
    """Chain over the tokens of all updates: equal for equal batches in equal order."""
    best: Best | None = None
    """null: not yet validated, or the kind keeps none."""
    last: dict[str, str | Number]
    """Figures of the summary: train_loss and valid_loss (nats per token), valid_ppl (per word), tokens_per_s,
    parameters, and what the kind adds."""
    ranks: int
    """Ranks of the start that saved it."""
    deepspeed: str
    """train.deepspeed of that start."""
    precision: str
    """train.precision of that start."""
    kernels: list[str] | UnsetType = UNSET
    """Operations that kernels in Triton did in that start (train.kernels); absent: torch did all."""
    tap: str | UnsetType = UNSET
    """The hidden state that a datastore holds."""
    optimizer: OptimizerState
    """What goes with optimizer.safetensors."""
    window: Window | UnsetType = UNSET
    """Updates that no line of metrics has told of; absent: none."""

    def identity(self) -> dict[str, object]:
        """Name → value of what a checkpoint must share with the run that continues it."""
        return {name: getattr(self, name) for name in self.IDENTITY}


class UpdatesState(TrainState, kw_only=True):
    """That of a kind that is trained by train.updates updates of equal size."""

    FILE = "RUN/checkpoints/step-NNNNNNNN/state.json (transformer_lm, hf, plm)"
    IDENTITY = (*TrainState.IDENTITY, "blocks_per_update")

    blocks_per_update: int
    """train.blocks_per_update."""


def fresh_state(
    kind: type[S], data: str, dictionary: str, train: TrainConfig, ranks: int, tap: str | None, **own: Any
) -> S:
    """The state at update 0; `own`: fields that only `kind` has."""
    return kind(
        data=data, dictionary=dictionary, seed=train.seed, update=0,
        last={"train_loss": None, "valid_loss": None, "valid_ppl": None, "tokens_per_s": 0.0},
        ranks=ranks, deepspeed=train.deepspeed, precision=train.precision, tap=UNSET if tap is None else tap,
        optimizer=OptimizerState.fresh(), **own,
    )  # fmt: skip


class LmSplit(Part, kw_only=True):
    """One text."""

    tokens: int
    """Tokens that were scored; of a masked language model the masked ones."""
    loss_nats: float
    """Mean loss in nats per token."""
    perplexity: float
    """Per word; of a masked language model per masked token."""
    words: int | UnsetType = UNSET
    """Words of the text, where tokens are sub-words."""
    token_perplexity: float | UnsetType = UNSET
    """Perplexity per token, where tokens are sub-words."""
    rows: int | UnsetType = UNSET
    """Masked language model: rows of the text."""
    rows_fingerprint: str | UnsetType = UNSET
    """Masked language model: which rows those are."""
    text_tokens: int | UnsetType = UNSET
    """Masked language model: tokens that read its memories, each once with each head: neither padding nor special."""
    memory: dict[str, MemoryUse] | UnsetType = UNSET
    """Of a model with memory: layer → use of its memory by this text; of a masked one without memory empty."""


class LmModel(Part, kw_only=True):
    """The model that was evaluated."""

    kind: str
    """model.kind."""
    parameters: int
    """Parameters, shared ones counted once; the values of memories are not among them."""
    memory_values: int | UnsetType = UNSET
    """Numbers of its memories' values; absent of other than masked language models without memory."""
    fingerprint: str
    """Of configuration, dictionary and weights."""
    memory_files: dict[str, str] | UnsetType = UNSET
    """File → hash of its memories' values; absent of other than masked language models without memory."""
    step: int | None
    """Updates that the weights have had."""
    checkpoint: str
    """Its folder."""


class Staleness(Part):
    """When the slots of a memory were last read first (Kim & Jung, figure 2)."""

    edges: list[int]
    """Last update of each of five equal stretches of the training, behind 0 for slots that never were."""
    slots: list[int]
    """Slots of each."""
    written: list[int] | UnsetType = UNSET
    """Slots that were last read at all, first or not, in each: since then their values stayed as they are."""


class LmResults(Record, kw_only=True):
    """Perplexity of a model without neighbours on each text."""

    FILE = "RUN/lm.json"
    WHAT = "evaluation results"
    WRITER = "distlm evaluate"
    READERS = ("distlm run", "distlm report", "distlm reproduce")
    MEND = "delete it and run `distlm evaluate` again"

    name: str
    """name of the run."""
    splits: dict[str, LmSplit]
    """Split, or name of a text of plm.texts → its perplexity."""
    context_rule: str
    """Which context each token had."""
    model: LmModel
    """Of which checkpoint."""
    tokens: str | UnsetType = UNSET
    """Fingerprint of the token files."""
    staleness: dict[str, Staleness] | UnsetType = UNSET
    """Layer → when the slots of its memory were last read first; as memory_values."""
    mask_seed: int | UnsetType = UNSET
    """Masked language model: seed of the masks (train.seed)."""
    mask_share: float | UnsetType = UNSET
    """Masked language model: share of the tokens that were masked (plm.mask_share)."""
    code: CodeVersion
    """Which code wrote this file."""
