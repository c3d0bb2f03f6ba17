"""What validation losses decide: averaging, halving, the end of fine-tuning; and what the log says."""

from support.record_examples import example

from distlm.models.awd_lstm.config import AwdConfig
from distlm.models.awd_lstm.phases import begin_finetuning, finetune_epochs, judge
from distlm.models.awd_lstm.records import Judgement, LstmState


def decisions(losses: list[float], awd: AwdConfig) -> tuple[list[str | None], LstmState]:
    phases = example(LstmState)
    phases.phase, phases.halvings, phases.losses, phases.log = "sgd", 0, [], []
    return [judge(phases, awd, epoch, loss) for epoch, loss in enumerate(losses, 1)], phases


RISING = [5.0, 6.0, 7.0, 8.0, 9.0]


def test_averaging_begins_once_and_for_good() -> None:
    found, phases = decisions(RISING, AwdConfig(nonmono=1))
    assert found == [None, None, "average", None, None]
    assert phases.phase == "asgd"
    assert [entry.fired for entry in phases.log] == [False, False, True, False, False]
    assert phases.log[2] == Judgement(epoch=3, phase="sgd", loss=7.0, rule="masked", least=5.0, fired=True)


def test_halving_and_plain_sgd() -> None:
    found, phases = decisions(RISING, AwdConfig(nonmono=1, on_trigger="halve"))
    assert found == [None, None, "halve", "halve", "halve"] and phases.halvings == 3
    found, phases = decisions(RISING, AwdConfig(nonmono=1, on_trigger="nothing"))
    assert set(found) == {None} and phases.phase == "sgd"
    assert [finetune_epochs(AwdConfig(on_trigger=name)) for name in ("average", "halve", "nothing")] == [750, 0, 0]


def test_fine_tuning_looks_at_its_own_losses_and_stops() -> None:
    awd = AwdConfig(nonmono=1)
    _, phases = decisions([1.0, 2.0], awd)
    begin_finetuning(phases)
    assert [judge(phases, awd, epoch, loss) for epoch, loss in enumerate([5.0, 4.0, 4.5, 4.1], 3)] == [
        None, None, None, "stop"
    ]  # fmt: skip
