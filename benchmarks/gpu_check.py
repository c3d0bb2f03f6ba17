"""What a GPU does with distlm, in ten minutes at most: is it right, and how fast is it.

Parts run one after the other, each in a process of its own with a limit of its own (see --list), and each gets a
verdict: ok, goal missed (of speed), failed, over time, or skipped with the reason, such as a package that is not
installed. After each part FOLDER/gpu-check.json holds all there is so far; at the end a table in Markdown is printed
and written beside it. What the parts print goes to FOLDER/gpu-check.log. Files of an earlier check there are replaced.

    python benchmarks/gpu_check.py [--device sim] [--parts memory,lstm] [--out FOLDER]

--device gpu is the accelerator that torch sees. --device sim is the tests' simulated device, which refuses what a GPU
refuses and computes on the processor; --device cpu compares the processor with itself. Both leave out what is speed
alone, but for --quick, and have ten times the time. No MPI and no network is needed. Exit code 1 where a part failed
or ran over time, 2 where the device is not there.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from gpu.devices import NoDevice, environment, require_gpu
from gpu.part import BAD, Record
from gpu.parts import BUDGET_S, PARTS, chosen
from gpu.report import table, write_json
from gpu.runner import run_parts
from shared.command import NO_FIGURES, Benchmark, Options
from shared.machine import described


def parser() -> Benchmark:
    """The command line."""
    parser = Benchmark(__doc__, device="cpu", parts="datastore")
    parser.add_argument("--device", choices=["gpu", "sim", "cpu"], default="gpu")
    parser.add_argument("--parts", default="", help="names with commas between; default: all")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of all parts together, on a GPU")
    parser.add_argument("--out", type=Path, help="folder of gpu-check.{json,md,log}; default: a temporary")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits, and end")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().options(arguments)
    if options.list:
        for part in PARTS:
            print(f"{part.name:10} {part.limit_s:3} s  {part.what}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.out or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            records = check(options, folder, Path(name))
        except (NoDevice, ValueError) as error:
            parser().error(str(error))
    if options.quick:
        print(NO_FIGURES)
    sys.exit(1 if any(record.verdict in BAD for record in records) else 0)


def check(options: Options, folder: Path, scratch: Path) -> list[Record]:
    """Run the parts; what is known of each. Raises NoDevice, and ValueError for the name of no part."""
    parts = chosen(options.parts)
    if options.device == "gpu":
        require_gpu()
    seen = environment(options.device, scratch)
    log = folder / "gpu-check.log"
    log.write_bytes(b"")
    records: list[Record] = []
    began = time.monotonic()
    head = {
        "format": 1,
        "device": options.device,
        "began": datetime.now().astimezone().isoformat("T", "seconds"),
        "machine": described(),
    }
    for record in run_parts(parts, options.device, seen, log, options.budget, options.quick):
        records.append(record)
        spent = round(time.monotonic() - began, 1)
        write_json(folder / "gpu-check.json", {**head, "seconds": spent}, records)
    text = table(records)
    (folder / "gpu-check.md").write_text(text + "\n", "utf-8")
    print(text)
    return records


if __name__ == "__main__":
    main()
