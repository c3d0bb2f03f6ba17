"""DeepSpeed's ZeRO stages with the device's own collectives: NCCL on CUDA. Two ranks where there are two devices."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from distlm.runtime.ranks.device import default_device, group_backend
from gpu import commands
from gpu.commands import SMALL
from gpu.part import Outcome, Place

STAGES = {1: (1, 0, 2, 3), 2: (2, 3)}
"""Ranks → ZeRO stages. The first is the one that the others are compared with. ZeRO 3 comes last: DeepSpeed then puts
its own linear layer in the place of torch's for the rest of a process."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
APART = 1e-5


def run(place: Place) -> Outcome:
    """Trainings of all stages on one rank, and on two; a sum by the device's collectives."""
    text = commands.text_of(place.folder)
    prepare = ["data", "prepare", "demo", *SMALL, *text, f"run_dir={place.folder / 'prepare'}"]
    commands.run([prepare, *(_training(place, text, 1, stage) for stage in STAGES[1])], place.folder)
    most = min(2, max(1, torch.accelerator.device_count()))
    out = Outcome({"collectives": _summed(), "ranks": most})
    if most > 1:
        # DeepSpeed keeps groups that distlm has left: each training of several ranks has processes of its own.
        commands.finish(
            *(
                commands.start([_training(place, text, 2, stage)], place.folder / f"two-{stage}", launcher=TORCHRUN)
                for stage in STAGES[2]
            )
        )
    first = _folder(place, 1, STAGES[1][0])
    for ranks in range(1, most + 1):
        for stage in STAGES[ranks]:
            found = _folder(place, ranks, stage)
            if found != first:
                apart = commands.relative(first, found)
                out.figures[f"ZeRO {stage}, ranks {ranks}: losses apart"] = float(f"{apart:.2e}")
                out.must(
                    apart < APART, f"ZeRO {stage} on {ranks} ranks: losses differ by {apart:.2e} from ZeRO 1's on one"
                )
    return out


def _folder(place: Place, ranks: int, stage: int) -> Path:
    return place.folder / f"{ranks}-zero{stage}"


def _training(place: Place, text: list[str], ranks: int, stage: int) -> list[str]:
    settings = [f"launch.ranks={ranks}", f"train.deepspeed=zero{stage}", f"run_dir={_folder(place, ranks, stage)}"]
    return ["train", "demo", *SMALL, *text, *settings]


def _summed() -> str:
    """The backend whose all-reduce left a tensor of the device as it must be."""
    device = default_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    dist.init_process_group(group_backend(), store=dist.HashStore(), rank=0, world_size=1)
    numbers = torch.arange(1000, dtype=torch.float32, device=device)
    dist.all_reduce(numbers)
    if not torch.equal(numbers.cpu(), torch.arange(1000, dtype=torch.float32)):
        raise ArithmeticError("an all-reduce over one rank changed its numbers")
    dist.destroy_process_group()
    return str(dist.get_default_backend_for_device(device))
