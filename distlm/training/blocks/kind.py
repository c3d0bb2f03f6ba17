"""What kinds of model that predict the next word share: most answers to what the house asks of a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distlm.models.kind import Kind

if TYPE_CHECKING:
    from distlm.runtime.plan import StagePlan
    from distlm.runtime.rundir import RunDir
    from distlm.runtime.stage import Stage

_SEARCH = "knn search"
KNN_STAGES = ("data prepare", "train", "datastore write", "index build", _SEARCH, "knn tune", "knn evaluate")
"""Stages of a run that ends in the kNN-LM."""


class CausalKind(Kind):
    """A kind of model that predicts the next word of token files."""

    def evaluated(self, config: Any, run: RunDir) -> bool:
        from distlm.training.finished import evaluated_as_trained

        return evaluated_as_trained(config, run)


class BlocksKind(CausalKind):
    """One that is trained and evaluated in blocks of tokens, by a fixed number of updates, and ends in a kNN-LM.

    Left to say are `name`, `description`, `config`, `model_sections`, `build`, `describe`, `require_tap`,
    `inner_floats`, `forward_flops`, `plan` and `job`.
    """

    def stages(self, config: Any) -> tuple[str, ...]:
        if not config.cache.use:
            return KNN_STAGES
        behind = KNN_STAGES.index(_SEARCH) + 1
        return (*KNN_STAGES[:behind], "knn cache", *KNN_STAGES[behind:])

    def require_ranks(self, config: Any, ranks: int) -> None:
        from distlm.training.blocks.plan import plan_blocks_cut

        plan_blocks_cut(config, ranks)

    def plan_evaluate(self, config: Any, ranks: int) -> StagePlan:
        from distlm.training.evaluate import plan_blocks

        return plan_blocks(config)

    def evaluate(self, stage: Stage) -> dict[str, float]:
        from distlm.training.evaluate import evaluate_in_blocks

        return evaluate_in_blocks(stage)
