"""`distlm evaluate`: each kind of model that is evaluated without neighbours has its own way."""

from importlib import import_module
from typing import Any

from distlm.config.schema import RunConfig
from distlm.runtime.plan import StagePlan
from distlm.runtime.stage import Stage

_WAYS = {"plm": "distlm.models.plm.measure.evaluate:run_evaluate_plm"}
_PLANS = {"plm": "distlm.models.plm.plan:plan_evaluate_plm"}


def run_evaluate(stage: Stage) -> dict[str, Any]:
    """RUN/lm.json; NAME of a text → perplexity."""
    way = _WAYS.get(stage.config.model.kind, "distlm.training.evaluate_lm:run_evaluate_lm")
    result: dict[str, Any] = _load(way)(stage)
    return result


def plan_evaluate(config: RunConfig, ranks: int) -> StagePlan:
    """Needs of it."""
    plan: StagePlan = _load(_PLANS.get(config.model.kind, "distlm.models.awd_lstm.plan:plan_evaluate"))(config, ranks)
    return plan


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
