"""What weights, gradients and optimizer states take on one rank, on its device and in the host's memory."""

from dataclasses import dataclass

from distlm.training.dsconfig import DeepSpeedConfig, offloaded, zero_stage

# DeepSpeed's own, where a configuration does not say.
_BUCKET, _LIVE, _REUSE = 500_000_000, 1_000_000_000, 1_000_000_000


@dataclass(frozen=True)
class StatesMemory:
    """Bytes of one rank. Without a device both are in the processor's memory."""

    device: int
    host: int
    """What is offloaded, and the buffers through which it goes."""
    saved: int
    """What rank 0 holds in the host's memory while a checkpoint is written: the optimizer's states, whole."""

    @property
    def all(self) -> int:
        """Of a rank that computes on the processor, without what a save holds."""
        return self.device + self.host


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank that trains, as StagePlan has them."""

    memory: int
    """Of a rank that computes on the processor."""
    device: int
    host: int


def training_peak(states: StatesMemory, beside: int, activations: int) -> Peak:
    """`beside`: what a rank holds of memories and the like; `activations`: of one micro-batch, gone in a save."""
    return Peak(
        states.all + beside + max(activations, states.saved),
        states.device + beside + activations,
        states.host + states.saved,
    )


def states_memory(
    parameters: int, largest: int, states: int, precision: str, config: DeepSpeedConfig, ranks: int
) -> StatesMemory:
    """Peak of weights, gradients, masters and optimizer states of one rank, without activations (Rajbhandari et al.
    2020, section 5; Ren et al. 2021, section 4; buffers as in DeepSpeed 0.19).

    `largest`: elements of the largest parameter; `states`: fp32 tensors of the optimizer per parameter; `config`: a
    loaded DeepSpeed configuration.
    """
    saved = 4 * parameters * states
    stage, away, zero = zero_stage(config), offloaded(config), config.get("zero_optimization", {})
    width = 4 if precision == "fp32" else 2
    if stage == 0:
        # Half precision has fp32 masters beside the weights.
        masters = 4 * (states + (width == 2))
        return StatesMemory((2 * width + masters) * parameters, 0, saved)
    shard = -(-parameters // ranks)
    # bf16 sums its gradients in fp32.
    gradients = (2 if precision == "fp16" else 4) * (parameters if stage == 1 else shard)
    masters = 4 * (states + 1) * shard
    weights = width * (shard if stage == 3 else parameters)
    # Two buckets on their way to the other ranks.
    bucket = min(int(zero.get("reduce_bucket_size", _BUCKET)), parameters)
    moving = 2 * width * bucket
    if stage == 3:
        # A layer's weights are gathered long before their use, as many as may live, and kept until their next use, in
        # backward, where that is not far. Its gradient is whole for a moment, and its norm is taken in fp32.
        kept = int(zero.get("stage3_max_reuse_distance", _REUSE)) // 2
        gathered = max(kept, int(zero.get("stage3_max_live_parameters", _LIVE))) + largest
        moving += width * min(gathered, parameters) + (width + 4) * largest
    if not away.optimizer:
        # The step has its gradient in fp32.
        device, host = masters + gradients + max(4 * shard, moving), 0
    elif stage == 3:
        # This rank's sums of a bucket come back to the device, in fp32 and once more.
        device, host = moving + 8 * -(-bucket // ranks), masters + 4 * shard + gradients
    else:
        # In bf16 this rank's sums stay on the device until the step; what else is summed lies in the host's memory.
        sums = 4 * shard if precision == "bf16" else 0
        device = (gradients + max(sums, moving) if stage == 1 else sums + moving) + width * largest
        host = masters + 4 * shard + width * shard * stage
    if away.weights:
        return StatesMemory(device, host + weights, saved)
    return StatesMemory(device + weights, host, saved)
