"""Whether tables lie in huge pages: rows at random places of ordinary ones cost a walk through the page table each."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

_MAPS = Path("/proc/self/smaps")
_FIRST_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def huge_share(planes: Iterable[Tensor]) -> float:
    """Of the memory that the planes have taken so far on a processor, the share in huge pages; NaN where there is none,
    or the system does not say. Local. Whole mappings are counted, which a large table has to itself."""
    ends = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in planes if x.device.type == "cpu" and x.nbytes]
    taken = huge = 0
    for first, last, sizes in _mappings():
        if any(begin < last and first < end for begin, end in ends):
            taken += sizes.get("Rss", 0)
            huge += sizes.get("AnonHugePages", 0)
    return huge / taken if taken else float("nan")


def _mappings() -> Iterator[tuple[int, int, dict[str, int]]]:
    """(first address, one past the last, name → kB) of this process's mappings."""
    try:
        lines = _MAPS.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    place, sizes = (0, 0), dict[str, int]()
    for line in lines:
        if found := _FIRST_LINE.match(line):
            yield (*place, sizes)
            place, sizes = (int(found[1], 16), int(found[2], 16)), {}
        elif (words := line.split())[-1:] == ["kB"]:
            sizes[words[0].rstrip(":")] = int(words[1])
    yield (*place, sizes)
