"""Adam for the values of memories, on the slots that were read, as an optimizer of torch."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from distlm.errors import Diverged, UsageError
from distlm.memory.config import MemoryConfig
from distlm.memory.values import state
from distlm.memory.values.engine import EngineSteps
from distlm.memory.values.table import ValueTable
from distlm.memory.values.update import update_table

_DEFAULTS = MemoryConfig()


@dataclass(frozen=True)
class ValueStep:
    """Outcome of one update of the values, one entry for each memory."""

    rows: list[int]
    """Slots that were read."""
    norms: list[float]
    """2-norm of the gradient, before clipping, over all columns."""
    bytes: int
    """Bytes that this rank sent in it."""


class SparseValueOptimizer(torch.optim.Optimizer):
    """SparseAdam, Adam or per-slot Adam on the values of product-key memories (Lample et al. 2019, §3.2; Kim & Jung
    2020, §5: Adam with sparse updates).

        optimizer = torch.optim.Adam(model.parameters())    # all but the values
        values = SparseValueOptimizer(model)                # the values

    It follows what torch's optimizers do: `param_groups`, `zero_grad`, `state_dict`, learning-rate schedulers, several
    backwards before a step, GradScaler. What differs:

    The values [K, D] are no parameters and their gradient never exists as a tensor: backwards collect what it consists
    of, and `step` uses that up. A memory that no backward has reached is left alone, as a parameter without gradient.
    In a group `params` has, for each memory, a number [] that stands for its values (ValueGradient.factor).

    The gradient is summed over all ranks of torch.distributed, by whichever of them read a slot, and with
    mean_over_ranks divided by their number: with each rank's loss a mean over its own tokens that is the gradient which
    DistributedDataParallel and DeepSpeed give parameters. `step` is collective: all ranks call it equally often.

    Slots that no token read since the last step stay as they are: lazy as torch's SparseAdam, or, with
    stale="catch_up", caught up with later. A change of lr, betas or eps (by a scheduler, say) is then paid for by a
    pass over the table, which makes the owed moves at the rate they are owed at.
    """

    sweep = 1 / 16
    """catch_up: an update that reads this share of the slots moves all of them, so that none is stale afterwards. To go
    through a table in order takes less time than to find, and to add in every forward, what its slots have missed."""

    # What makes GradScaler call `step` whatever it has found, so that the ranks stay together and nothing is left over.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: nn.Module | Iterable[nn.Module] | Iterable[dict[str, Any]],
        lr: float = _DEFAULTS.lr,
        betas: tuple[float, float] = (_DEFAULTS.betas[0], _DEFAULTS.betas[1]),
        eps: float = _DEFAULTS.eps,
        *,
        form: Literal["sparse_adam", "adam"] = _DEFAULTS.optimizer,
        row_steps: bool = _DEFAULTS.row_steps,
        stale: Literal["lazy", "catch_up"] = _DEFAULTS.stale,
        moments: Literal["fp32", "bf16"] = _DEFAULTS.moments,
        clip_norm: float = _DEFAULTS.clip_norm,
        mean_over_ranks: bool = True,
    ) -> None:
        """params: a model, all of whose memories it takes; or some of its modules; or groups, dicts with "params" (such
        modules) and options of their own. A DeepSpeed engine as the model: `step`, called after each `engine.step()`,
        then keeps to the engine's accumulation, loss scale and skipped steps.

        lr, betas, eps: as torch's SparseAdam (form="sparse_adam": ε added to √v) or Adam (form="adam": to the corrected
        √v̂). row_steps: bias correction by the number of a slot's own updates. moments: what Adam's m and v are
        kept in. clip_norm: largest 2-norm of a memory's gradient (0: any).

        Raises UsageError when there is no memory, a setting cannot work, or the model was built before
        torch.distributed was initialised.
        """
        config = {"form": form, "row_steps": row_steps, "stale": stale, "moments": moments, "clip_norm": clip_norm}
        self._begin(params, {"lr": lr, "betas": betas, "eps": eps, **config, "mean_over_ranks": mean_over_ranks})
        if not self.tables:
            raise UsageError("SparseValueOptimizer: there is no ProductKeyMemory in what was given")
        for table in self.tables:
            table.exchange.check_world()

    @classmethod
    def of(cls, config: MemoryConfig, tables: Sequence[ValueTable]) -> "SparseValueOptimizer":
        """By the section `memory` of a configuration, on no tables, too: what the trainers of this package make.

        They call `update`, which is told the scale, as they have their own loss scaling.
        """
        optimizer = cls.__new__(cls)
        own = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "clip_norm": config.clip_norm}
        rest = {
            "form": config.optimizer,
            "row_steps": config.row_steps,
            "stale": config.stale,
            "moments": config.moments,
        }
        optimizer._begin([{"params": list(tables)}], {**own, **rest, "mean_over_ranks": False}, scalers=False)
        optimizer.config = config
        return optimizer

    def _begin(self, params: Any, defaults: dict[str, Any], scalers: bool = True) -> None:
        """scalers: a GradScaler may come, which must find the same on every rank."""
        self._scalers = scalers
        self.tables: list[ValueTable] = []
        """In the order of the groups' params."""
        self.config = _DEFAULTS
        """Of `of`."""
        self.outcome: ValueStep | None = None
        """Of the latest update."""
        self._engine = EngineSteps.of(params)
        modules: Any = [params] if isinstance(params, nn.Module) else params
        super().__init__(modules, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A dict with "params" (a module or several, whose memories are taken) and options of the group."""
        given = param_group["params"]
        modules = [given] if isinstance(given, nn.Module) else list(given)
        if not all(isinstance(module, nn.Module) for module in modules):
            raise UsageError("SparseValueOptimizer: give modules that hold memories, not tensors: the model, say")
        found = (part for module in modules for part in module.modules() if isinstance(part, ValueTable))
        # A memory that several layers share is one.
        tables = list(dict.fromkeys(found))
        super().add_param_group({**param_group, "params": [table.gradient.factor for table in tables]})
        self.tables += tables
        for table in tables:
            table.gradient.agree = self._scalers and table.exchange.size > 1
        self._configure()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update by what the backwards since the last one have collected; returns what `closure` returns.

        What a GradScaler (or the DeepSpeed engine given) skips is forgotten. Raises Diverged on every rank, with the
        tables unchanged and the gradient forgotten, when it is not finite and nobody scales it. Collective.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, skipped = 1.0, False
        if self._engine is not None:
            taken = self._engine.next()
            if taken is None:
                return loss
            skipped, loss_scale = taken
            scale /= loss_scale
        for table in self.tables:
            table.exchange.check_world()
        # A GradScaler has set both for this call; grad_scale is None where it has divided already.
        scaled = hasattr(self, "found_inf")
        if (given := getattr(self, "grad_scale", None)) is not None:
            scale /= float(given)
        if skipped or (scaled and not self.finite()):
            self.drop()
            return loss
        self._configure()
        factors = [1.0 if (mark := table.gradient.factor.grad) is None else float(mark) for table in self.tables]
        ranks = [table.exchange.size if group["mean_over_ranks"] else 1 for group, table in self._pairs()]
        reached = [not (table.gradient.empty or table.config.frozen) for table in self.tables]
        self.outcome = self._apply(
            [scale * factor / size if there else None
             for factor, size, there in zip(factors, ranks, reached, strict=True)]
        )  # fmt: skip
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what the backwards have collected. Local."""
        self.drop()

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether what was collected is finite in all memories on all ranks; the same on every rank.

        For a loss scaler, before `update` or `drop`: one collective of one number per memory. Collective.
        """
        return not any(self._not_finite())

    @torch.no_grad()
    def update(self, scale: float = 1.0) -> ValueStep:
        """`step` for a caller that scales by itself: apply `scale` times the collected gradient. Collective.

        scale undoes what the losses were multiplied with: 1 / (loss scale·ranks) where each rank's loss is the mean
        over its own tokens. All replicas make the same update, to the bit. A table that nobody read counts it, too.
        Raises Diverged as `step`.
        """
        if self.config.frozen or not self.tables:
            return ValueStep([0] * len(self.tables), [0.0] * len(self.tables), 0)
        return self._apply([scale] * len(self.tables))

    def drop(self) -> None:
        """Forget the collected gradient without an update (skipped for overflow). Local."""
        for table in self.tables:
            table.gradient.clear()

    def state_dict(self) -> dict[str, Any]:
        """As torch's: param_groups, and the state of each memory (distlm.memory.values.state.of_optimizer): on several
        ranks the moments of this rank's columns. The values are in the model's state dict."""
        # The tables have the moments; torch looks for them here.
        self.state.update(
            {table.gradient.factor: found for table in self.tables if (found := state.of_optimizer(table))}
        )
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, on the same cut of the columns. Raises ValueError when it is of other memories,
        with what differs; other groups are told from these by torch."""
        # Torch would cast counters to the dtype of what stands for a memory.
        # The groups of a version that knew moments in fp32 alone do not say so.
        groups = [{"moments": "fp32", **group} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups, "state": {}})
        for place, (group, table) in enumerate(self._pairs()):
            state.load_optimizer(table, state_dict["state"].get(place, {}), _config(table, group))

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("tables", "config", "outcome", "sweep", "_engine", "_scalers")}
        return {**super().__getstate__(), **own}

    def _pairs(self) -> Iterable[tuple[dict[str, Any], ValueTable]]:
        groups = (group for group in self.param_groups for _ in group["params"])
        return zip(groups, self.tables, strict=True)

    def _configure(self) -> None:
        """The groups' options, which schedulers change, reach the tables."""
        for group, table in self._pairs():
            table.configure(_config(table, group))

    def _apply(self, scales: Sequence[float | None]) -> ValueStep:
        """Update each table by its factor; None: not at all."""
        exchange = self.tables[0].exchange
        before = sum(exchange.bytes.values())
        wrong = [table for table, count in zip(self.tables, self._not_finite(), strict=True) if count]
        if wrong:
            self.drop()
            raise Diverged(
                f"the gradient of the memory's values in layer {wrong[0].layer} is infinite or NaN at its update "
                f"{wrong[0].updates + 1} (its lr {wrong[0].config.lr:.3g})"
            )
        outcomes = [
            (0, 0.0) if scale is None else update_table(table, scale, group["clip_norm"], self.sweep)
            for (group, table), scale in zip(self._pairs(), scales, strict=True)
        ]
        rows, norms = [rows for rows, _ in outcomes], [norm for _, norm in outcomes]
        return ValueStep(rows, norms, sum(exchange.bytes.values()) - before)

    def _not_finite(self) -> list[float]:
        if not self.tables:
            return []
        device = self.tables[0].values.device
        counts = torch.stack([table.gradient.not_finite().to(device) for table in self.tables])
        counts_of_all: list[float] = self.tables[0].exchange.sum(counts, "finite").tolist()
        return counts_of_all


def _config(table: ValueTable, group: Mapping[str, Any]) -> MemoryConfig:
    """A group's options as settings of the table."""
    beta1, beta2 = group["betas"]
    return dataclasses.replace(
        table.config, lr=float(group["lr"]), betas=[float(beta1), float(beta2)], eps=float(group["eps"]),
        optimizer=group["form"], row_steps=group["row_steps"], stale=group["stale"], moments=group["moments"],
        clip_norm=group["clip_norm"],
    )  # fmt: skip
