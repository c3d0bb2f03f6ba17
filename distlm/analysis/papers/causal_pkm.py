"""The table of `distlm reproduce causal-pkm`, from what is finished in its folder.

table.md, .csv   perplexity alone and with neighbours, and use of the memories by held-out text, of every model
curve.png, .csv  perplexity on valid over the updates
"""

from collections.abc import Mapping
from pathlib import Path

from distlm.analysis.papers.pkm_plm_models import TOP1_MU
from distlm.analysis.plots.training import perplexity_curves
from distlm.analysis.results.from_csv import figure, lines_of, percent
from distlm.analysis.results.records import ResultRow, ResultsPath
from distlm.analysis.results.verdict import MARGIN_OF_USE, above, lower
from distlm.analysis.sentences import lowest_and_highest
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_picture, write_text
from distlm.knnlm.evaluate.records import Results
from distlm.memory.records import MemoryUse, use_cells
from distlm.models.perplexity import perplexity
from distlm.runtime import metrics
from distlm.runtime.rundir import RunDir
from distlm.training.finished import RESULT
from distlm.training.records import LmResults

MODELS = {
    "dense": "dense", "pkm": "PKM", "resm": "ResM", "init": "Init (dense, as long again)", "init-pkm": "Init + PKM",
}  # fmt: skip
"""Run → what the table calls it."""
_USE_OF = "valid"
"""The split whose reads are counted."""
_DENSE = {"dense": "dense", "init": "dense, as long again"}
PATH: ResultsPath = "Memory in causal models"
TABLES = {"table.csv": "perplexity alone and with neighbours, and use of the memories by valid"}
NOTES = (
    "One seed. Lample et al. have up to 30 billion words and memories of up to a billion parameters: there 12 layers "
    "with a memory have a lower perplexity than 24 without.",
)


def write_tables(root: Path) -> str:
    """Write what there is the data for; the table as text."""
    results = {run: Results.read(path) for run in MODELS if (path := RunDir(root / run).results).exists()}
    # The findings are told on it.
    results = {run: found for run, found in results.items() if _USE_OF in found.splits}
    if not results:
        raise nothing_finished(root)
    splits = list(dict.fromkeys(split for found in results.values() for split in found.splits))
    rows, raw = [], []
    for run, found in results.items():
        ppl: list[float | None] = []
        for split in splits:
            there = found.splits.get(split)
            ppl += [None, None] if there is None else [there.lm.perplexity, there.knn.perplexity if there.knn else None]
        use = _use(root / run)
        layers = list(use)
        shares = use_cells(use.values())
        parameters, step = found.model.parameters, found.model.step
        size = [f"{parameters / 1e6:.2f} M", str(step)]
        rows.append([MODELS[run], *size, *("" if p is None else f"{p:.2f}" for p in ppl), ", ".join(layers), *shares])
        head = [run, parameters, step, *("" if p is None else p for p in ppl)]
        measured = {layer: [getattr(each, name) for name in MemoryUse.NAMES] for layer, each in use.items()}
        raw += [[*head, layer, *numbers] for layer, numbers in (measured or {"": [""] * len(MemoryUse.NAMES)}).items()]
    columns = [f"{split} {what}" for split in splits for what in ("LM", "+ kNN")]
    names = ["run", "parameters", "updates", *columns, "layer", *MemoryUse.NAMES]
    write_csv(root / "table.csv", [name.replace("+ ", "").replace(" ", "_") for name in names], raw)
    table = markdown(["model", "parameters", "updates", *columns, "memory of layer", *MemoryUse.HEADS], rows)
    note = (
        "Perplexity per word; λ, T and k tuned on valid. Parameters without the memories' values; updates of this run, "
        f"those of the dense model that Init starts from not counted. Use of the memories by the text of {_USE_OF}."
    )
    write_text(root / "table.md", f"{table}\n\n{note}")
    _curve(root)
    return f"{table}\n\n{note}\n\ntable and figure: {root}"


def rows(root: Path) -> list[ResultRow]:
    """Each model beside the dense one of as many updates, and what starting from a dense one does to the memory."""
    lines = lines_of(root / "table.csv")
    found = {line["run"]: line for line in lines}
    made = []
    for run, line in found.items():
        own = float(line["valid_LM"]), float(line["valid_kNN"])
        other = found.get("init" if run == "init-pkm" else "dense")
        if run in ("dense", "init") or other is None:
            continue
        against = float(other["valid_LM"]), float(other["valid_kNN"])
        row = ResultRow(
            f"{MODELS[run]} (and {_DENSE[other['run']]}): valid LM, + kNN",
            figure("{:.2f}, {:.2f} ({:.2f}, {:.2f})", *own, *against), 0,
        )  # fmt: skip
        row.finding, row.verdict = "a memory lowers the perplexity", lower(own[0], against[0])
        made.append(row)
    first = {run: [percent(line["top1_mu"]) for line in lines if line["run"] == run and line["layer"]] for run in found}
    for run in ("pkm", "init-pkm"):
        if first.get(run):
            row = ResultRow(
                f"top-1 MU of {MODELS[run]}, the lowest of its layers", figure("{:.1f} %", min(first[run])), 0,
                paper=figure("{:.1f} %", min(TOP1_MU[run])),
            )  # fmt: skip
            if run == "pkm":
                row.finding = "from nothing most slots are never read first (Kim & Jung)"
                row.verdict = above(50.0, min(first[run]), MARGIN_OF_USE)
            made.append(row)
    return made


def _use(run: Path) -> Mapping[str, MemoryUse]:
    """Layer → use of its memory; empty without memory, and before `distlm evaluate`."""
    path = run / RESULT
    splits = LmResults.read(path).splits if path.exists() else {}
    return (splits[_USE_OF].memory or {}) if _USE_OF in splits else {}


def _curve(root: Path) -> None:
    curves = {}
    for run, name in MODELS.items():
        losses = metrics.points(list(RunDir(root / run).metrics.read("train")), metrics.VALID_LOSS)
        if losses:
            curves[name] = [(step, perplexity(loss)) for step, loss in losses]
    if not curves:
        return
    rows = [[name, *point] for name, points in curves.items() for point in points]
    write_csv(root / "curve.csv", ["run", "update", "valid_perplexity"], rows)
    top = 1.5 * max(points[-1][1] for points in curves.values())
    seen = lowest_and_highest({name: points[-1][1] for name, points in curves.items()}, "Perplexity on valid")
    write_picture(root / "curve.png", perplexity_curves(curves, top, "token", seen))
