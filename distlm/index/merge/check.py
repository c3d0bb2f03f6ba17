"""What is checked of a merge while its bytes are in memory: that the ids number the keys, or that parts read as they
were written."""

import numpy as np
import xxhash

from distlm.errors import DistlmError
from distlm.index.layout import Array, group_lists
from distlm.index.merge.copy import MergeLayout, read_pieces, unit_ids
from distlm.index.merge.ids import IdBits, require_range


class IdCheck:
    """Marks the ids of the units of this rank."""

    def __init__(self, names: list[str], bits: IdBits, shifted: bool, shifts: list[int]) -> None:
        """names, shifts: of each part; shifted: ids are each file's own."""
        self.bits, self.least = bits, dict[int, int]()
        """Least id of each part that has any here, as it will be."""
        self._names, self._shifted, self._shifts = names, shifted, shifts

    def unit(self, layout: MergeLayout, low: int, high: int, whole: Array, copied: bool) -> None:
        """Raises DistlmError for an id that no key can have."""
        for part, ids in unit_ids(layout, low, high, whole):
            shift = self._shifts[part]
            least = require_range(ids - shift, layout.rows[part], self._names[part], self._shifted, self.bits)
            self.least[part] = min(self.least.get(part, least + shift), least + shift)
            self.bits.add(ids)


class SumCheck:
    """Compares the lists of every part with their checksums in its sidecar.

    A group of lists is checked with the unit in which it begins; what of it lies beyond is read for that.
    """

    def __init__(self, sums: list[str], mends: list[str]) -> None:
        """sums: PartRecord.lists of each part; mends: what helps when a part is damaged."""
        self._sums, self._mends = [np.frombuffer(bytes.fromhex(of), ">u8") for of in sums], mends

    def unit(self, layout: MergeLayout, low: int, high: int, whole: Array, copied: bool) -> None:
        """Raises DistlmError for a damaged part."""
        if not copied:
            return
        nlist = layout.sizes.shape[1]
        step = group_lists(nlist)
        heads = layout.offsets[:-1:step]
        first, last = (int(np.searchsorted(heads, edge)) for edge in (low, high))
        if first == last:
            return
        lists = (first * step, min(last * step, nlist))
        for part, starts, stops in layout.segments(*lists):
            inner = np.minimum(stops, high)
            for group in range(first, last):
                own = slice(2 * step * (group - first), 2 * step * (group - first + 1))
                digest, missing = xxhash.xxh3_64(), int((stops[own] - np.maximum(starts[own], inner[own])).sum())
                for start, stop in zip(starts[own].tolist(), inner[own].tolist(), strict=True):
                    if start < stop:
                        digest.update(whole[start - low : stop - low].data)
                if missing:
                    end = int(layout.part_offsets[part, min((group + 1) * step, nlist)])
                    for piece in read_pieces(layout.paths[part], end - missing, missing):
                        digest.update(piece)
                if digest.intdigest() != self._sums[part][group]:
                    raise DistlmError(
                        f"{layout.paths[part]}: damaged: lists {group * step} to {min((group + 1) * step, nlist) - 1} "
                        f"do not read as they were written; {self._mends[part]}"
                    )
