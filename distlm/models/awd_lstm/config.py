"""Settings of the AWD-LSTM and its training."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from distlm.config.fields import LENGTH, volatile
from distlm.config.schema import DatastoreConfig, ModelConfig, RunConfig, TrainConfig
from distlm.models.kind import CausalDescription


@dataclass
class LstmConfig(CausalDescription):
    """The AWD-LSTM (Merity et al. 2017); the defaults are the authors' for WikiText-2."""

    KIND: ClassVar[str] = "awd_lstm"

    layers: int = 3
    """LSTM layers."""
    width: int = 400
    """Width D of the embedding and of the last layer, also the key width. The decoder is tied to the embedding."""
    hidden_width: int = 1150
    """Width of the layers below the last one."""
    embedding_dropout: float = 0.1
    """Whole words whose embedding is dropped for one update (dropoute)."""
    input_dropout: float = 0.65
    """Locked dropout on the embedded input (dropouti): one mask per column for all time steps."""
    hidden_dropout: float = 0.2
    """Locked dropout between layers (dropouth)."""
    output_dropout: float = 0.4
    """Locked dropout on the output of the last layer, before the decoder (dropout)."""
    weight_dropout: float = 0.5
    """Dropout on the hidden-to-hidden weights of every layer, one mask per update (wdrop)."""
    max_positions: int = 65536
    """Longest sequence that datastore and evaluation may give in one pass, in tokens; it bounds memory only."""


@dataclass
class AwdConfig:
    """Training of the AWD-LSTM: streams of text, AR and TAR, NT-ASGD, fine-tuning."""

    batch: int = 80
    """Columns the corpus is cut into, over all ranks: the batch size."""
    micro_batch: int = volatile(0)  # type: ignore[assignment]
    """Columns in one forward pass (0: all columns of a rank). It cuts the work, and may change at any time."""
    bptt: int = 70
    """Base length of a chunk, in tokens, to which train.lr belongs."""
    variable_length: bool = True
    """Draw chunk lengths around bptt and scale the rate with them (section 5 of the paper); false: always bptt."""
    ar: float = 2.0
    """α: weight of the mean square of the dropped output of the last layer."""
    tar: float = 1.0
    """β: weight of the mean square of the change of the last layer's output from step to step."""
    epochs: int = field(default=750, metadata=LENGTH)
    """Epochs of SGD and NT-ASGD. They may grow in a run without fine-tuning: with awd.finetune_epochs=0, or
    awd.on_trigger other than average."""
    finetune_epochs: int = field(default=750, metadata=LENGTH)
    """Most epochs of fine-tuning, which averages anew from the best weights until the trigger fires. They may grow in
    any run."""
    trigger: Literal["masked", "window"] = "masked"
    """masked: the validation loss exceeds the least of all but the last `nonmono` validations (the authors' code);
    window: the least of the last `nonmono` (the text of the arXiv paper)."""
    log_interval: int = 0
    """L of Algorithm 1: updates of an epoch between two validations, at which the trigger looks; the end of the epoch
    is one, too (0: that alone, as in the authors' code)."""
    nonmono: int = 5
    """n of the trigger, in validations."""
    on_trigger: Literal["average", "halve", "nothing"] = "average"
    """average: NT-ASGD; halve: SGD that halves its rate each time (Table 4); nothing: plain SGD."""
    average_from: Literal["second_step", "trigger"] = "second_step"
    """First weights in the average: those of the second step after the trigger (the authors' code, through torch's
    ASGD), or those at the trigger (Algorithm 1, where the sum begins at i = T)."""
    reference_eta_lag: bool = False
    """While averaging, step with the rate of the chunk before, as the authors' code does; false: each chunk's own."""
    valid_batch: int = 10
    """Columns of the validation during training. `distlm evaluate` reads the split as one stream."""


@dataclass
class LstmTraining(TrainConfig):
    """Training with DeepSpeed; how long is awd.epochs and awd.finetune_epochs."""

    optimizer: Literal["nt_asgd"] = "nt_asgd"
    """SGD that turns into averaged SGD."""
    tap: str = "last_output"
    """Which hidden state a datastore will hold; it is recorded in the checkpoint."""


@dataclass
class LstmRun(RunConfig):
    """A run of the AWD-LSTM."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("awd_lstm"))
    """Its kind."""
    lstm: LstmConfig = field(default_factory=LstmConfig)
    """The AWD-LSTM."""
    awd: AwdConfig = field(default_factory=AwdConfig)
    """Training of the AWD-LSTM."""
    datastore: DatastoreConfig = field(default_factory=lambda: DatastoreConfig(tap="last_output"))
    """Keys and values of the training tokens."""
    train: LstmTraining = field(default_factory=LstmTraining)
    """Training."""
