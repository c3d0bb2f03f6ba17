"""Reads a faiss factory string: what it will be for this many keys, or why it is refused and what to write instead."""

import re
from dataclasses import dataclass, field
from typing import Any

from distlm.errors import DistlmError, UsageError
from distlm.index.faiss_module import require_faiss

KEYS_PER_LIST = 39
"""Fewest training keys per list (and per PQ centroid) that faiss accepts without a warning."""
MOST_KEYS_PER_LIST = 256
"""faiss k-means uses no more keys per list than this."""


@dataclass(frozen=True)
class Factory:
    """A factory string fitted to a store."""

    asked: str
    used: str
    """As asked, with the list count scaled down when keys are few."""
    width: int
    """D, the key width."""
    nlist: int
    code_size: int
    """Bytes of one code on disk; each key takes 8 more for its id."""
    sample: int
    """Keys the template is trained on."""
    messages: list[str] = field(default_factory=list)
    """What the user should know: scaled lists, few keys for PQ."""

    @property
    def key_bytes(self) -> int:
        """Bytes of one key in the index."""
        return self.code_size + 8

    def build(self) -> Any:
        """An untrained faiss index (L2)."""
        return build_factory(self.used, self.width)


def check_factory(asked: str, width: int) -> Any:
    """The index of a factory string for keys of `width` values, untrained.

    Raises DistlmError for a string faiss does not know, one without inverted lists or with none of them, one whose
    lists cannot be merged on disk, and a PQ that does not divide the width.
    """
    found = re.findall(r"IVF(\d+)", asked)
    if len(found) > 1:
        raise UsageError(f"index.factory={asked!r}: more than one IVF; write one, e.g. IVF4096,PQ64")
    if found and int(found[0]) < 1:
        raise UsageError(f"index.factory={asked!r}: an index needs at least one list; write e.g. IVF4096,PQ64")
    index = build_factory(asked, width)
    check_mergeable(index, asked)
    return index


def fit_factory(asked: str, width: int, rows: int, sample: int, keys_per_list: int = KEYS_PER_LIST) -> Factory:
    """Fit a factory string to `rows` keys of `width` values, of which at most `sample` train it.

    The list count becomes the largest power of two n with keys_per_list·n ≤ min(rows, sample) when it was asked larger
    than that allows. Raises DistlmError as check_factory, and for too few keys for a PQ.
    """
    if rows < 1:
        raise DistlmError("the datastore is empty: an index needs at least one key")
    if sample < 1:
        raise UsageError(f"index.sample={sample}: must be at least 1")
    index = check_factory(asked, width)
    nlist, messages = int(re.findall(r"IVF(\d+)", asked)[0]), []
    usable = min(rows, sample)
    if nlist > 1 and usable < keys_per_list * nlist:
        scaled = 1 << max(0, (usable // keys_per_list).bit_length() - 1)
        what = "the datastore's rows" if rows <= sample else "index.sample"
        messages.append(
            f"index.factory={asked}: {nlist} lists need {keys_per_list * nlist} training keys and {what} give "
            f"{usable}; using {scaled} lists"
        )
        nlist = scaled
    used = re.sub(r"IVF\d+", f"IVF{nlist}", asked)
    # faiss trains each centroid of a PQ on as many keys as a list, and needs them also when the lists are few.
    enough = MOST_KEYS_PER_LIST * max(nlist, 1 << max(8, quantizer_bits(index, asked)))
    fitted = min(usable, enough)
    messages += _check_quantizer(index, asked, fitted)
    return Factory(asked, used, width, nlist, inverted_file(index).code_size, fitted, messages)


def build_factory(text: str, width: int) -> Any:
    """faiss.index_factory with L2 distance; DistlmError naming the string, the width and the mend."""
    faiss = require_faiss()
    try:
        return faiss.index_factory(width, text, faiss.METRIC_L2)
    except RuntimeError as error:
        message = str(error)
        if "multiple of the number of subquantizers" in message or "d % M" in message:
            raise DistlmError(_wrong_divisor(text, width)) from error
        reason = message.rpartition("Error: ")[2].strip()
        raise UsageError(
            f"index.factory={text!r}: faiss cannot build it for width {width} ({reason}); write e.g. IVF4096,PQ64"
        ) from error


def check_mergeable(index: Any, text: str) -> None:
    """DistlmError when an index has no inverted lists, or lists that cannot be merged on disk."""
    name = f"index.factory={text!r}"
    if reason := why_unmergeable(index):
        plain = re.sub(r"fsr?(?=$|,|_)", "", re.sub(r"fsr?_\d+", "fs", text))
        raise DistlmError(f"{name}: {reason}" + (f": use {plain} (the same codes)" if plain != text else ""))
    kind = type(inverted_file(index)).__name__
    if not re.search(r"IVF\d", text):
        raise DistlmError(f"{name}: {kind} without a plain number of lists; write IVF4096,… for 4,096 of them")
    known = ("Flat", "PQ", "ScalarQuantizer", "RaBitQ", "ResidualQuantizer")
    if kind.removeprefix("IndexIVF") not in known:
        raise DistlmError(
            f"{name}: {kind} is not one of the codes whose bytes are the same on any number of ranks; use IVF…,PQ…, "
            "SQ…, RaBitQ, RQ… or Flat"
        )


def why_unmergeable(index: Any) -> str | None:
    """Why the lists of an index cannot be merged on disk, and what to take instead; None when they can."""
    faiss = require_faiss()
    outer = faiss.downcast_index(index)
    inner = faiss.downcast_index(outer.index) if isinstance(outer, faiss.IndexPreTransform) else outer
    kind, name = type(outer).__name__, type(inner).__name__
    if isinstance(outer, faiss.IndexIDMap):
        return f"{kind} keeps its ids outside the lists; add with ids to the inverted file itself"
    if not isinstance(inner, faiss.IndexIVF):
        over = "" if inner is outer else f"{kind} over "
        return (
            f"{over}{name} has no inverted lists to merge; use IVF…,PQ…, IVF…,SQ8 or IVF…,Flat (knn.search=brute "
            "searches without an index)"
        )
    if "FastScan" in name:
        return (
            f"{name} packs codes in blocks of 32, whose lists cannot be joined or renumbered on disk; keep the plain "
            "form (IVF…,PQ…x4 without fs) on disk, which is repacked when it is searched"
        )
    if isinstance(inner, faiss.IndexIVFPQR):
        return f"{name} keeps second codes outside the lists; use IVF…,PQ… and knn.distances=exact, which has the keys"
    return None


def inverted_file(index: Any) -> Any:
    """The IVF inside an index or a transform, as its own class (the base class hides `.pq`)."""
    faiss = require_faiss()
    inner = faiss.downcast_index(faiss.extract_index_ivf(index))
    # The inner object lives in the outer one: without this reference Python would free it under the caller.
    inner.referenced_objects = [*getattr(inner, "referenced_objects", []), index]
    return inner


def quantizer_bits(index: Any, asked: str) -> int:
    """Bits of a product quantiser's number, of its own or of the OPQ before it; 0 without one."""
    inner = inverted_file(index)
    bits = int(inner.pq.nbits) if isinstance(inner, require_faiss().IndexIVFPQ) else 0
    return max(bits, 8) if "OPQ" in asked else bits


def _check_quantizer(index: Any, asked: str, sample: int) -> list[str]:
    """Messages on how well `sample` keys train the product quantiser; DistlmError when they cannot."""
    bits = quantizer_bits(index, asked)
    if not bits:
        return []
    if sample < 1 << bits:
        raise UsageError(
            f"index.factory={asked!r}: a product quantiser of {bits} bits needs at least {1 << bits} training keys "
            f"and there are {sample}; use index.factory=IVF1,SQ8 or IVF1,Flat for so small a store"
            + ("" if bits <= 4 else f", or {bits - 4} bits")
        )
    wanted = KEYS_PER_LIST << bits
    if sample < wanted:
        return [f"index.factory={asked}: {sample} keys train {1 << bits} centroids roughly (wanted: {wanted} or more)"]
    return []


def _wrong_divisor(text: str, width: int) -> str:
    asked = re.findall(r"O?PQ(\d+)", text)
    inner = width
    if reduced := re.search(r"(?:PCA[WR]*|RR)(\d+)", text) or re.search(r"OPQ\d+_(\d+)", text):
        inner = int(reduced[1])
    divisors = ", ".join(str(number) for number in range(1, inner + 1) if inner % number == 0)
    after = "" if inner == width else " after the transform"
    return (
        f"index.factory={text!r}: PQ{asked[-1] if asked else ''} does not divide the key width {inner}{after}; "
        f"choose one of {divisors}"
    )
