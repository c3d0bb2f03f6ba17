"""DeepSpeed's view of the device."""

import contextlib
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


class SimAccelerator(CPU_Accelerator):
    """The processor's accelerator, where the two differ: names, precisions, memory, generators."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "sim"
        self._communication_backend_name = "simccl"

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return "sim" if device_index is None else f"sim:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        return torch.sim.device(device_index)  # type: ignore[attr-defined]

    def set_device(self, device_index: int) -> None:
        torch.accelerator.set_device_index(device_index)

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def current_device_name(self) -> str:
        return f"sim:{self.current_device()}"

    def device_count(self) -> int:
        return torch.accelerator.device_count()

    def synchronize(self, device_index: int | None = None) -> None:
        torch.accelerator.synchronize()

    # One stream in fact: work is done when it is asked for, and only copies to the host are late.
    @property
    def Stream(self) -> Any:
        return partial(torch.Stream, device="sim")

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext() if stream is None else stream

    def current_stream(self, device_index: int | None = None) -> Any:
        return torch.accelerator.current_stream()

    def default_stream(self, device_index: int | None = None) -> Any:
        return torch.accelerator.current_stream()

    @property
    def Event(self) -> Any:
        return partial(torch.Event, device="sim")

    def random(self) -> Any:
        return torch.random

    def set_rng_state(self, new_state: Any, device_index: int | None = None) -> None:
        torch.sim.set_rng_state(new_state, device_index)  # type: ignore[attr-defined]

    def get_rng_state(self, device_index: int | None = None) -> Any:
        return torch.sim.get_rng_state(device_index)  # type: ignore[attr-defined]

    def manual_seed(self, seed: int) -> None:
        torch.sim.manual_seed(seed)  # type: ignore[attr-defined]

    def manual_seed_all(self, seed: int) -> None:
        torch.sim.manual_seed_all(seed)  # type: ignore[attr-defined]

    def empty_cache(self) -> None:
        torch.accelerator.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.accelerator.memory_allocated()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.accelerator.max_memory_allocated()

    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float, torch.half, torch.bfloat16]

    def pin_memory(self, tensor: Any, align_bytes: int = 1) -> Any:
        return tensor.pin_memory()

    def is_pinned(self, tensor: Any) -> bool:
        return bool(tensor.is_pinned())

    def on_accelerator(self, tensor: Any) -> bool:
        return bool(tensor.device.type == "sim")

    def is_available(self) -> bool:
        return True


def use_in_deepspeed() -> None:
    """DeepSpeed's accelerator becomes the device."""
    set_accelerator(SimAccelerator())
