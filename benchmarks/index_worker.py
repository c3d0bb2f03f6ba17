"""One process of benchmarks/index.py --ranks: adds its share of the keys, or multiplies matrices; prints units/s."""

import sys
import time
from pathlib import Path

import numpy as np

from distlm.index.build.encode import Encoder
from distlm.index.layout import deserialise

SECONDS = 10.0


def main() -> None:
    work, folder, rank, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    print(add(folder, rank, count) if work == "add" else multiply())


def add(folder: Path, rank: int, count: int) -> float:
    """Keys per second; rank r takes every count-th batch."""
    keys = np.load(folder / "keys.npy", mmap_mode="r")
    index = deserialise((folder / "trained").read_bytes())
    with Encoder(index, 1) as encoder:
        starts = range(rank * encoder.batch, len(keys) - encoder.batch, count * encoder.batch)
        done, began = 0, time.perf_counter()
        for start in starts:
            batch = keys[start : start + encoder.batch].astype(np.float32)
            encoder.add(batch, np.arange(start, start + len(batch)))
            done += len(batch)
            if time.perf_counter() - began > SECONDS:
                break
        return done / (time.perf_counter() - began)


def multiply() -> float:
    """Products of 1,024 × 1,024 matrices per second."""
    left = np.ones((1024, 1024), np.float32)
    left @ left
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        left @ left
        done += 1
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
