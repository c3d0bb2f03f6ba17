"""What is here: the device, the builds that talk to it, and what it copies and multiplies at most."""

import importlib.metadata
import platform

import torch

from distlm.runtime.ranks.device import default_device, group_backend
from gpu.part import Outcome, Place
from gpu.peaks import copy_rate, product_rate

PACKAGES = ("numpy", "deepspeed", "faiss-cpu", "faiss-gpu", "transformers", "triton", "mpi4py")
SIDES = {"fp32": 4096, "fp16": 8192, "bf16": 8192}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(place: Place) -> Outcome:
    """Names and versions; on a GPU its peaks, too."""
    device = default_device()
    out = Outcome({"device": str(device.type), "python": platform.python_version(), "torch": torch.__version__})
    out.must((device.type == "cpu") == (place.device == "cpu"), f"distlm computes on {device}, not on {place.device}")
    out.figures["groups"] = group_backend()
    for name in PACKAGES:
        try:
            out.figures[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out.figures[name] = None
    if device.type == "cuda":
        _of_cuda(out)
    product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
    out.must(bool((product == 64).all()), "a product of ones is wrong")
    if place.measures:
        out.figures["copy GB/s"] = round(copy_rate(device, 1 if place.quick else 2048) / 1e9, 1)
        for name, dtype in DTYPES.items():
            if name != "bf16" or has_bf16():
                rate = product_rate(device, dtype, 64 if place.quick else SIDES[name])
                out.figures[f"{name} TFLOP/s"] = round(rate / 1e12, 1)
    return out


def _of_cuda(out: Outcome) -> None:
    major, minor = torch.cuda.get_device_capability()
    out.figures |= {
        "name": torch.cuda.get_device_name(), "capability": f"sm_{major}{minor}", "CUDA": torch.version.cuda,
        "HIP": torch.version.hip, "cuDNN": str(torch.backends.cudnn.version()),
        "memory GB": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1), "bf16": has_bf16(),
    }  # fmt: skip
    if torch.distributed.is_nccl_available():
        out.figures["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    built = torch.cuda.get_arch_list()
    # Code of a smaller minor number of the same major one runs, too; compute_NN is translated when it is loaded.
    own = [arch for arch in built if arch.startswith(f"sm_{major}") or arch.startswith("compute_")]
    out.must(
        bool(own) or torch.version.hip is not None,
        f"this build of torch is for {', '.join(built)} and not for sm_{major}{minor}",
    )


def has_bf16() -> bool:
    """Whether the device itself computes in bf16, which torch also imitates where it does not."""
    if torch.cuda.is_available() and torch.version.hip is None:
        return torch.cuda.get_device_capability()[0] >= 8
    return True
