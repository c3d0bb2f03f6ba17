"""Compile every kernel, as the functions that start it would, for GPUs that need not be here: compile_kernels.py 70 90.

Not under TRITON_INTERPRET. Prints a line for each: architecture, kernel, registers of a thread, bytes that it spills.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from distlm.kernels import adam, bags, slots, softmax
from distlm.memory.retrieval import candidate_pairs

WIDTH, READS = 768, 128
_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip
Call = tuple[Any, dict[str, str], list[str], dict[str, Any]]


def kind(argument: object) -> str:
    if isinstance(argument, Tensor):
        return f"*{_NAMES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def calls() -> list[Call]:
    """What is started with, by tensors of the processor: (kernel, types of its arguments, those that a start would find
    to be multiples of 16, constants)."""
    found: list[Call] = []

    def record(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **constants: Any) -> None:
        names = [name for name in kernel.arg_names if name not in constants]
        given = dict(zip(names, arguments, strict=True))
        # A start compiles ones as constants.
        ones = {name: 1 for name, x in given.items() if isinstance(x, int) and x == 1}
        given = {name: x for name, x in given.items() if name not in ones}
        aligned = [name for name, x in given.items() if isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0)]
        found.append((kernel, {name: kind(x) for name, x in given.items()}, aligned, {**constants, **ones}))

    for module in (adam, bags, slots, softmax):
        module.launch = record  # type: ignore[attr-defined]
    index, offsets = torch.zeros(4, READS).int(), torch.arange(5).int()
    # The least that there is, and the shapes of a large model.
    one, offset = torch.zeros(1, 1), torch.arange(2).int()
    adam.adam_rows((one, one, one), offset[:1].long(), (one, offset[:1], one[0], offset), 1.0, (0.9, 0.999),
                   (one[0], one[0]), (offset[:1].long(), 1))  # fmt: skip
    slots.best_slots(one.view(1, 1, 1, 1).expand(1, 2, 1, 1), offset[:1], offset[:1], 1)
    softmax.log_probs(one, offset[:1].long(), derive=True)
    bags.score_gradients(one, offset[:1, None], one)
    table, logits = torch.zeros(9, WIDTH), torch.zeros(9, 20002).half()
    bags.token_sums(table, index, torch.zeros(4, READS))
    bags.score_gradients(table, index, table[:4])
    softmax.log_probs(logits, torch.zeros(9).long(), derive=True)
    softmax.derive_(logits, torch.zeros(9).long(), torch.zeros(9), torch.zeros(9))
    for dtype, own in ((torch.float32, 1), (torch.bfloat16, 4)):
        planes = torch.zeros(9, WIDTH), torch.zeros(9, WIDTH, dtype=dtype), torch.zeros(9, WIDTH, dtype=dtype)
        sums = torch.zeros(9, WIDTH), index[0], torch.zeros(READS), offsets
        rows, steps = torch.arange(4), (torch.zeros(own), torch.zeros(own))
        adam.adam_rows(planes, rows, sums, 1.0, (0.9, 0.999), steps, (rows, 0))
    left, right = torch.tensor(candidate_pairs(33, 1024)).unbind(1)
    slots.best_slots(torch.zeros(4, 2, 3, 1024), left, right, 32)
    return found


def usage(ptx: str, architecture: int) -> str:
    """Registers and spilled bytes, as the assembler of Triton's own wheel says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        # sm_90a, of 90.
        target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", str(source)]
        said = subprocess.run([*command, "-o", f"{source}.o"], capture_output=True, text=True, check=True).stderr
    registers = re.findall(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill stores", said)
    return f"{registers[-1]} {spills[-1]}"


def main() -> None:
    for kernel, types, aligned, constants in calls():
        options = {"num_warps": constants.pop("num_warps"), "enable_fp_fusion": False}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        for architecture in map(int, sys.argv[1:]):
            source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            print(architecture, kernel.__name__, usage(compiled.asm["ptx"], architecture), flush=True)


if __name__ == "__main__":
    main()
