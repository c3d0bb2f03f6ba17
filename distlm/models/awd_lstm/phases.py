"""Phases of an AWD-LSTM's training: SGD, NT-ASGD from the trigger on, fine-tuning; decided by validation losses."""

from typing import Any

from distlm.models.awd_lstm.config import AwdConfig
from distlm.models.awd_lstm.nt_asgd import trigger_fires

SGD, ASGD, FINETUNE = "sgd", "asgd", "finetune"


def fresh_phases() -> dict[str, Any]:
    """State at update 0, as it goes into a checkpoint: JSON."""
    return {"phase": SGD, "halvings": 0, "losses": [], "log": []}


def finetune_epochs(awd: AwdConfig) -> int:
    """Fine-tuning is averaging anew, so there is none where nothing is averaged."""
    return awd.finetune_epochs if awd.on_trigger == "average" else 0


def judge(phases: dict[str, Any], awd: AwdConfig, epoch: int, loss: float) -> str | None:
    """Take the validation loss of an epoch into `phases`. Returns what must happen: average, halve, stop or None.

    The entry of the log says what was compared. NT-ASGD does not go back: once averaging, the trigger is not asked.
    """
    before = phases["losses"]
    asked = phases["phase"] == FINETUNE or (phases["phase"] == SGD and awd.on_trigger != "nothing")
    fired = asked and trigger_fires(before, loss, awd.trigger, awd.nonmono)
    compared = before[: -awd.nonmono] if awd.trigger == "masked" else before[-awd.nonmono :]
    phases["log"].append(
        {
            "epoch": epoch, "phase": phases["phase"], "loss": loss, "rule": awd.trigger,
            "least": min(compared) if len(before) > awd.nonmono else None, "fired": fired,
        }
    )  # fmt: skip
    before.append(loss)
    if not fired:
        return None
    if phases["phase"] == FINETUNE:
        return "stop"
    if awd.on_trigger == "halve":
        phases["halvings"] += 1
        return "halve"
    phases["phase"] = ASGD
    return "average"


def begin_finetuning(phases: dict[str, Any]) -> None:
    """Fine-tuning has losses of its own."""
    phases["phase"], phases["losses"] = FINETUNE, []
