"""The DeepSpeed engine behind a small interface: joins the ranks, runs micro-batches, reads and writes full state.

The only file that imports deepspeed. One rank goes through the same engine as many.

Facts about DeepSpeed 0.19 that this file takes care of, each covered by a test:
- ZeRO 0 in bf16 makes an optimizer step with zero gradients while it is set up, which advances Adam's step count and
  applies weight decay: `_undo_warm_up` takes it back. (In fp16 it is wrong altogether: dsconfig refuses it.)
- ZeRO 3 cannot write a full tensor whose size does not divide over the ranks: `write` writes each rank's part.
- ZeRO 0 in fp32 reports no gradient norm, and steps by one that is not finite: `update` computes it, and skips that.
- Its CPU accelerator compiles a shared-memory all-reduce for inference with g++ when a process group is made; training
  never calls it: `_import_deepspeed` switches it off.
- It refuses fp16 on processors without native fp16 units, where torch computes it all the same: `_allow_fp16_on_cpu`.
"""

import contextlib
import importlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from distlm.errors import DistlmError, Diverged
from distlm.models.buffers import kept_buffers
from distlm.runtime.progress import say
from distlm.runtime.ranks.network import network_error, of_network
from distlm.runtime.ranks.world import World
from distlm.training.dsconfig import DeepSpeedConfig
from distlm.training.objective import Objective
from distlm.training.records import Number, OptimizerState


@runtime_checkable
class Averaging(Protocol):
    """An optimizer that can begin to keep means of its weights, as states of its own."""

    def start_averaging(self) -> None:
        """Begin a new mean."""


_GROUP_FIELDS = ("lr_old", "averaged", "eta")
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def share(values: Sequence[float]) -> list[list[float]]:
    """Every rank's numbers, in rank order, on every rank: fp64, equally many on each. Collective."""
    mine = torch.tensor(values, dtype=torch.float64)
    if dist.get_world_size() == 1:
        return [mine.tolist()]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [row.tolist() for row in everyone]


@dataclass(frozen=True)
class Step:
    """Outcome of one optimizer update."""

    gradient_norm: float
    """2-norm of the averaged gradient before clipping; inf when it was not finite."""
    skipped: bool
    """The weights were left alone, because the gradient was not finite (fp16: the loss scale was too large)."""
    loss_scale: float
    """fp16 loss scale that the next update starts with; 1 in other precisions."""


class Engine:
    """One rank's end of the DeepSpeed engine. Methods are collective unless they say otherwise."""

    def __init__(
        self,
        module: Objective,
        optimizer: torch.optim.Optimizer,
        config: DeepSpeedConfig,
        world: World,
        device: torch.device,
    ) -> None:
        """Hand `module` (fp32, on any device) and its optimizer to DeepSpeed.

        `config` is a merged DeepSpeed configuration (dsconfig.merge_ds_config); join_group comes before.
        Raises DistlmError when DeepSpeed refuses the configuration, Unreached when a rank is gone.
        """
        self.module, self.device, self._base = module, device, optimizer
        self.names = {name: parameter for name, parameter in module.model.named_parameters()}
        """Parameter name → parameter of the model, shared ones once."""
        half = [name for name in ("fp16", "bf16") if name in config]
        self.precision = half[0] if half else "fp32"
        deepspeed = _import_deepspeed(world, device)
        if self.precision == "fp16" and device.type == "cpu":
            _allow_fp16_on_cpu(deepspeed, world)
        self._access = deepspeed.utils
        # Ours is tested with every stage; without this DeepSpeed warns of it.
        deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))
        try:
            # DeepSpeed's bf16 optimizer prints memory reports.
            with contextlib.redirect_stdout(io.StringIO()):
                self._engine, self._wrapper, _, _ = deepspeed.initialize(
                    model=module, optimizer=optimizer, config=config, dist_init_required=False
                )
        except (AssertionError, ValueError, NotImplementedError, RuntimeError) as error:
            if of_network(error):
                raise network_error(error, f"{world} lost the other ranks while DeepSpeed was set up") from error
            raise DistlmError(f"train.deepspeed: DeepSpeed refuses this configuration: {error}") from error
        self.stage = int(self._engine.zero_optimization_stage())
        self._masters = self._find_masters()
        if self.stage == 0 and self.precision != "fp32":
            self._undo_warm_up()

    def buffers(self) -> dict[str, Tensor]:
        """The model's kept_buffers as they are now on this rank: DeepSpeed neither shards nor rounds them. Local."""
        return kept_buffers(self.module.model)

    def train(self) -> None:
        """Dropout on. Local."""
        self._engine.train()

    def eval(self) -> None:
        """Dropout off. Local."""
        self._engine.eval()

    def forward(self, *arguments: Any) -> Any:
        """The objective's forward. Under ZeRO 3 collective: every rank must make equally many forwards."""
        return self._engine(*arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Differentiate one micro-batch's loss; `last` is this rank's last micro-batch before `update`."""
        self._engine.backward(loss)
        if not last:
            self._engine.step()

    def update(self, lr: float) -> Step:
        """Average the gradients over micro-batches and ranks, clip, and step with learning rate `lr`.

        Raises Diverged where they overflow fp16 whatever the loss scale.
        """
        for group in self._base.param_groups:
            group["lr"] = lr
        norm = self._plain_norm() if self._plain else None
        if norm is not None and not math.isfinite(norm):
            self._engine.zero_grad()
            # The micro-batches of the next update are counted from here, as after a step.
            self._engine.micro_steps += 1
            return Step(math.inf, True, self.loss_scale)
        try:
            self._engine.step()
        except Exception as error:
            if "minimum" not in str(error):
                raise
            raise Diverged("the gradients overflow fp16 even at the smallest loss scale") from error
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        skipped = bool(getattr(self._wrapper, "overflow", False))
        return Step(norm if math.isfinite(norm) else math.inf, skipped, self.loss_scale)

    @property
    def loss_scale(self) -> float:
        """fp16 loss scale of the next backward pass; 1 in other precisions. Local."""
        scaler = self._scaler()
        return float(scaler.cur_scale) if scaler is not None and self.precision == "fp16" else 1.0

    def state_keys(self) -> list[str]:
        """Names of the optimizer's per-parameter tensors, e.g. exp_avg; none before the first applied update. Local."""
        self._link_states()
        holder = self._holders()[0]
        state = self._base.state.get(holder, {})
        return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.shape == holder.shape)

    def read(self, name: str, key: str | None = None) -> Tensor:
        """A parameter's fp32 master weight, or its optimizer state `key`: fp32, in full, shaped as the parameter."""
        parameter = self.names[name]
        if self._masters is not None:
            master = self._masters[name]
            return (master if key is None else self._base.state[master][key]).detach()
        if key is None:
            value = self._access.safe_get_full_fp32_param(parameter)
        else:
            value = self._access.safe_get_full_optimizer_state(parameter, key)
        return value.detach()

    def write(self, name: str, value: Tensor, key: str | None = None) -> None:
        """Set what `read` reads; every rank passes the same full value (fp32). The compute copy is not refreshed: give
        the model the same weights before the engine is made. Local."""
        parameter: Any = self.names[name]
        if self._masters is not None:
            master = self._masters[name]
            with torch.no_grad():
                (master if key is None else self._base.state[master][key]).copy_(value)
            return
        value = value.to(self.device, torch.float32)
        if self.stage == 3:
            part = _part_of_rank(value, parameter.ds_tensor.numel())
            if key is None:
                self._access.safe_set_local_fp32_param(parameter, part)
            else:
                self._access.safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            self._access.safe_set_full_fp32_param(parameter, value)
        else:
            self._access.safe_set_full_optimizer_state(parameter, value, key)

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from other weights: masters and compute copies. fp32 and ZeRO 0 to 2 only. Local."""
        assert self.precision == "fp32" and self.stage < 3
        for name, value in weights.items():
            self.write(name, value)
            self.names[name].data.copy_(value)

    @contextlib.contextmanager
    def weights_from(self, key: str) -> Iterator[None]:
        """Within the block the model computes with the optimizer's state `key` (averages) as its weights.

        fp32 and ZeRO 0 to 2 only. Memory: one more copy of the weights. Do not step within it.
        """
        assert self.precision == "fp32" and self.stage < 3
        before = {name: parameter.detach().clone() for name, parameter in self.names.items()}
        for name, parameter in self.names.items():
            parameter.data.copy_(self.read(name, key))
        try:
            yield
        finally:
            for name, parameter in self.names.items():
                parameter.data.copy_(before[name])

    def start_averaging(self) -> None:
        """The optimizer's start_averaging, known to DeepSpeed. Local."""
        assert isinstance(self._base, Averaging)
        self._base.start_averaging()
        self._link_states()

    def scalars(self, average: str | None = None) -> OptimizerState:
        """The optimizer's and loss scaler's plain numbers (step count, lr_old, loss scale …). Local.

        `average`: the state that is the model to be used.
        """
        state = self._base.state.get(self._holders()[0], {})
        counts: dict[str, Number] = {
            key: float(value) for key, value in state.items() if not torch.is_tensor(value) or value.dim() == 0
        }
        group = {key: self._base.param_groups[0][key] for key in _GROUP_FIELDS if key in self._base.param_groups[0]}
        scaler = self._scaler()
        fields = {} if scaler is None else {n: getattr(scaler, n) for n in _SCALER_FIELDS if hasattr(scaler, n)}
        return OptimizerState(keys=self.state_keys(), average=average, state=counts, group=group, scaler=fields)

    def restore_scalars(self, scalars: OptimizerState) -> None:
        """Set what `scalars` gave, and make room for the states of its keys, which `write` then fills. Local."""
        self._base.state.clear()
        if scalars.keys:
            for holder in self._holders():
                state = {key: torch.zeros_like(holder, requires_grad=False) for key in scalars.keys}
                # torch's Adam counts its steps in an fp32 tensor; the fused one reads it where the weights are.
                place = holder.device if self._base.defaults.get("fused") else torch.device("cpu")
                counts = {key: torch.tensor(value, device=place) for key, value in scalars.state.items()}
                state |= {key: value.float() for key, value in counts.items()}
                self._base.state[holder] = state
            if hasattr(self._wrapper, "_lazy_init_hp_params_optimizer_state"):
                self._wrapper._lazy_init_hp_params_optimizer_state()
        for group in self._base.param_groups:
            group.update(scalars.group)
        scaler = self._scaler()
        for key, value in scalars.scaler.items():
            if scaler is not None and hasattr(scaler, key):
                setattr(scaler, key, value)

    @property
    def _plain(self) -> bool:
        """ZeRO 0 in fp32: DeepSpeed steps the client's optimizer itself."""
        return self._wrapper is self._base

    def _link_states(self) -> None:
        """DeepSpeed looks for the optimizer's states once, after the first group's first step: those of other groups,
        and those that come later, it does not find."""
        if getattr(self._wrapper, "_hp_optimizer_states_linked", False):
            self._wrapper._hp_optimizer_states_linked = False
            self._wrapper._lazy_init_hp_params_optimizer_state()

    def _plain_norm(self) -> float:
        gradients = [parameter.grad for parameter in self.names.values() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _find_masters(self) -> dict[str, Tensor] | None:
        """Name → fp32 master tensor where each rank has all of them (ZeRO 0); None where they are sharded."""
        if self._plain:
            return dict(self.names)
        if self.stage > 0:
            return None
        pairs = zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups, strict=True)
        masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return {name: masters[id(parameter)] for name, parameter in self.names.items()}

    def _undo_warm_up(self) -> None:
        assert self._masters is not None
        self._base.state.clear()
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(self.names[name])

    def _holders(self) -> list[Tensor]:
        """The tensors that the client's optimizer steps: parameters, masters or flat shards."""
        shards = getattr(self._wrapper, "fp32_partitioned_groups_flat", None)
        # ZeRO 3 empties the optimizer's groups between steps.
        return list(shards) if shards else [p for group in self._base.param_groups for p in group["params"]]

    def _scaler(self) -> Any:
        return getattr(self._wrapper, "loss_scaler", None) or getattr(self._wrapper, "loss_scale_config", None)


def _part_of_rank(value: Tensor, size: int) -> Tensor:
    """This rank's `size` elements of a tensor cut over all ranks, zeros after its end."""
    flat = value.flatten()
    start = size * dist.get_rank()
    part = torch.zeros(size, dtype=value.dtype, device=value.device)
    mine = flat[start : start + size]
    part[: len(mine)] = mine
    return part


def _import_deepspeed(world: World, device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed takes the device's number from here (under mpirun it wants both to agree), launcher or not.
    index = device.index if device.index is not None else world.local_rank
    for variable in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if variable == "LOCAL_RANK" or variable in os.environ:
            os.environ[variable] = str(index)
    # DeepSpeed calls collectives by names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    try:
        import deepspeed
        import deepspeed.ops
        import deepspeed.utils
    except ImportError as error:
        raise DistlmError(f"training needs deepspeed: pip install 'deepspeed>=0.19.8' ({error})") from error
    # No compatible op, no compiling and no probing for compilers. Delete when DeepSpeed builds it on first use.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    _import_muon_uncompiled()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=True)
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Every start of DeepSpeed imports its Muon optimizer, which we do not use; compiling it loads torch's compiler, a
    third of the time that a rank takes to begin."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _allow_fp16_on_cpu(deepspeed: Any, world: World) -> None:
    accelerator = deepspeed.accelerator.get_accelerator()
    if not accelerator.is_fp16_supported():
        say("fp16: this processor has no fp16 units, torch emulates them slowly; use fp32", world.rank)
        accelerator.is_fp16_supported = lambda: True
