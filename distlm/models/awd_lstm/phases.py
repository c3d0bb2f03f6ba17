"""Phases of an AWD-LSTM's training: SGD, NT-ASGD from the trigger on, fine-tuning; decided by validation losses."""

from typing import Literal, Protocol

from distlm.models.awd_lstm.config import AwdConfig
from distlm.models.awd_lstm.nt_asgd import trigger_fires
from distlm.models.awd_lstm.records import Judgement

SGD: Literal["sgd"] = "sgd"
ASGD: Literal["asgd"] = "asgd"
FINETUNE: Literal["finetune"] = "finetune"


class Phases(Protocol):
    """What LstmState has of them."""

    phase: Literal["sgd", "asgd", "finetune"]
    halvings: int
    losses: list[float]
    log: list[Judgement]


def finetune_epochs(awd: AwdConfig) -> int:
    """Fine-tuning is averaging anew, so there is none where nothing is averaged."""
    return awd.finetune_epochs if awd.on_trigger == "average" else 0


def judge(phases: Phases, awd: AwdConfig, epoch: int, loss: float) -> str | None:
    """Take the validation loss of an epoch into `phases`. Returns what must happen: average, halve, stop or None.

    The entry of the log says what was compared. NT-ASGD does not go back: once averaging, the trigger is not asked.
    """
    before = phases.losses
    asked = phases.phase == FINETUNE or (phases.phase == SGD and awd.on_trigger != "nothing")
    fired = asked and trigger_fires(before, loss, awd.trigger, awd.nonmono)
    compared = before[: -awd.nonmono] if awd.trigger == "masked" else before[-awd.nonmono :]
    least = min(compared) if len(before) > awd.nonmono else None
    phases.log.append(Judgement(epoch, phases.phase, loss, awd.trigger, least, fired))
    before.append(loss)
    if not fired:
        return None
    if phases.phase == FINETUNE:
        return "stop"
    if awd.on_trigger == "halve":
        phases.halvings += 1
        return "halve"
    phases.phase = ASGD
    return "average"


def begin_finetuning(phases: Phases) -> None:
    """Fine-tuning has losses of its own."""
    phases.phase, phases.losses = FINETUNE, []
