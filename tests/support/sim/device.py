"""torch gets the device: called by `import torch` itself, through the entry point `torch.backends`."""

import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

from support.sim.build import MODULE


def register() -> None:
    """Name the device, load its module, and leave word for torch.distributed and DeepSpeed."""
    if MODULE not in os.environ or os.environ.get("SIM_DEVICES") == "0":
        return
    extension = _extension(Path(os.environ[MODULE]))
    torch.utils.rename_privateuse1_backend("sim")
    extension.register()
    torch._register_device_module("sim", _module(extension))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _move_in_place(extension)
    from support.sim.group import register_backend

    register_backend()
    # DeepSpeed is slow to import: it gets its accelerator when somebody imports it.
    sys.meta_path.insert(0, _AfterDeepSpeed())


def _extension(path: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("distlm_sim", str(path))
    spec = importlib.util.spec_from_file_location("distlm_sim", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _move_in_place(extension: Any) -> None:
    """`Module.to` keeps a module's parameters, as it does between the processor and CUDA: torch lets other devices
    replace them, and then optimizers and ties would hold what is no longer there."""
    plain, compatible = torch._C.TensorBase.data, torch._has_compatible_shallow_copy_type

    def assign(tensor: torch.Tensor, value: torch.Tensor) -> None:
        if value.device.type != tensor.device.type:
            extension.become(tensor, value)
        else:
            plain.__set__(tensor, value)  # type: ignore[attr-defined]

    # torch's compiler compares the signature with that of its own function.
    def may_assign(input: torch.Tensor, from_: torch.Tensor) -> bool:
        return {input.device.type, from_.device.type} == {"cpu", "sim"} or compatible(input, from_)

    torch.Tensor.data = property(plain.__get__, assign)  # type: ignore[assignment, attr-defined]
    torch._has_compatible_shallow_copy_type = may_assign


def _module(extension: Any) -> types.ModuleType:
    """`torch.sim`, with what torch and its users ask of a device's module."""

    def index_of(device: Any) -> int:
        if device is None:
            return int(extension.current_device())
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return int(extension.current_device()) if index is None else index

    def each_device(seed: int) -> None:
        for index in range(extension.device_count()):
            extension.default_generator(index).manual_seed(seed)

    class OnDevice:
        """`with torch.sim.device(index)`."""

        def __init__(self, device: Any) -> None:
            self._index = index_of(device)

        def __enter__(self) -> None:
            self._before = extension.exchange_device(self._index)

        def __exit__(self, *_: object) -> None:
            extension.exchange_device(self._before)

    module = types.ModuleType("torch.sim")
    module.__dict__.update(
        is_available=lambda: extension.device_count() > 0,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        device_count=extension.device_count,
        current_device=extension.current_device,
        set_device=lambda device: extension.exchange_device(index_of(device)) and None,
        device=OnDevice,
        synchronize=lambda device=None: extension.synchronise(),
        manual_seed=lambda seed: extension.default_generator(extension.current_device()).manual_seed(seed),
        manual_seed_all=each_device,
        initial_seed=lambda: extension.default_generator(extension.current_device()).initial_seed(),
        get_rng_state=lambda device=None: extension.default_generator(index_of(device)).get_state(),
        set_rng_state=lambda state, device=None: extension.default_generator(index_of(device)).set_state(state),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        get_device_properties=lambda device=None: types.SimpleNamespace(name="sim", total_memory=1 << 34),
        get_device_name=lambda device=None: "sim",
        operators_run=extension.operators_run,
    )
    return module


class _AfterDeepSpeed:
    """An import hook: deepspeed's accelerator is set right after its package of accelerators is there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "deepspeed.accelerator":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        plain = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            plain(module)
            from support.sim.accelerator import use_in_deepspeed

            use_in_deepspeed()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
