"""The machine and the code that figures are of: a record without them cannot be compared with another."""

import os
from pathlib import Path
from typing import Any

from distlm.index.build.integer_lists import FAST_INT8
from distlm.runtime.rundir import code_version
from distlm.runtime.speeds import machine, processor_flags

_LOAD = os.getloadavg() if hasattr(os, "getloadavg") else ()
"""When the benchmark was started: from then on it is a load itself."""
_FLAGS = {"avx512": {"avx512f"}, "int8": FAST_INT8}
"""What decides how fast products are, and the processor's flags of which it has one then."""


def described(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Processor, cores of this process and GPU; whether it has AVX-512 and fast products of int8 (null: not known);
    mean load of the last 1, 5 and 15 minutes at the start; the commit, null outside a git tree."""
    flags = processor_flags(cpuinfo)
    has = {name: bool(flags & any_of) if flags else None for name, any_of in _FLAGS.items()}
    return {"machine": machine(), **has, "load": [round(mean, 1) for mean in _LOAD], "commit": code_version().git}


def in_words() -> str:
    """The same for people, without the machine's name and the commit."""
    found = described()
    words = [f"{name} {({True: 'yes', False: 'no'}).get(found[name], 'not known')}" for name in _FLAGS]
    return f"Load at the start {', '.join(map(str, found['load']))}; {', '.join(words)}."
