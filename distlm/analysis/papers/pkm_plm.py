"""The tables and figures of `distlm reproduce pkm-plm` (Kim & Jung 2020), from what is finished in its folder.

sweep.md, .csv         slots × reads: use of PKM's memories on every text after a short training
pretraining.md, .csv   table 2: perplexity of masked tokens and use of the memories on held-out text
curve.png, .csv        figure 3: perplexity on valid over the updates
staleness.png, .csv    figure 2: when slots were last read first; .md also when they were last written
finetuning.md, .csv    tables 4 and 5: medians on dev, memory updated and frozen, of every task that is done
compared.csv           how far scores are apart, and how sure that is
usage.md, .csv         table 6: use of the memories on dev after fine-tuning
classes.png, .csv      figure 4: how differently the labels of SST-2 use the slots, before and after
seeds.md, .csv         the above over the seeds, where a model has several
processor.csv          processor time of each run
findings.md            chief figures beside the paper's, and whether its findings appear
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from distlm.analysis.papers.pkm_plm_models import MODELS, finished, words_of
from distlm.analysis.papers.pkm_plm_rows import rows as rows
from distlm.analysis.papers.pkm_plm_scores import COMPARED, Finetuning, write_compared
from distlm.analysis.papers.pkm_plm_seeds import write_seeds
from distlm.analysis.papers.pkm_plm_sweep import reads_a_slot, write_sweep
from distlm.analysis.papers.seeds import BY_T
from distlm.analysis.plots.groups import grouped_bars, stacked_shares
from distlm.analysis.plots.training import perplexity_curves
from distlm.analysis.processor import PROCESSOR_TABLE, write_processor_time
from distlm.analysis.results.page import lines_of_rows
from distlm.analysis.results.records import ResultsPath
from distlm.analysis.sentences import lowest_and_highest
from distlm.analysis.tables import markdown, nothing_finished, write_csv, write_picture, write_text
from distlm.finetune.records import FinetuneResults, Scores
from distlm.finetune.tasks.glue import TASKS
from distlm.memory.records import MemoryUse, use_cells
from distlm.models.perplexity import perplexity
from distlm.runtime import metrics
from distlm.runtime.rundir import RunDir
from distlm.training.records import LmResults

PATH: ResultsPath = "Memory in masked models"
TABLES = {
    "sweep.csv": "use of PKM's memories after a short training, over slots and reads",
    "seeds.csv": "the models over their seeds",
    "pretraining.csv": "perplexity of masked tokens, and use of the memories",
    "staleness.csv": "slots by when they were last read first, and last read at all",
    "finetuning.csv": "scores on dev after fine-tuning, seed by seed",
    COMPARED: "scores that are compared, in %, with standard errors over the rows of dev and over the seeds",
    "usage.csv": "use of the memories on dev after fine-tuning",
    "classes.csv": "how differently the labels of SST-2 use the slots, before and after fine-tuning",
    PROCESSOR_TABLE: "processor time, all starts of a run together",
}
NOTES = (
    "Perplexity of masked tokens; the paper's is of another masking and vocabulary. Where a model has several seeds: "
    "mean ± standard error. Perplexities are compared seed by seed, for the masked tokens follow the seed.",
    f"An effect is seen where it is more than {BY_T}, and of one seed where it is more than 1 % of the perplexity; "
    "ResM is no worse where it is at most 1 % higher, with as much certainty. Scores must differ by more than t over "
    "the rows of dev, and over the seeds where there are several.",
)
_METRICS = {"MNLI": ("accuracy", "accuracy_mismatched"), "SQuAD": ("exact_match", "f1")}
"""Task → its columns in table 4; of the others the task's metric alone."""
_CLASS_WORDS = {"kl": "KL of the labels' use, nats", "iou": "IOU of the labels' use"}


def write_tables(root: Path) -> str:
    """Write what there is the data for; the tables as text."""
    results = finished(root)
    found = list(_finetunings(root, results))
    sweep = write_sweep(root)
    if not results and not found and not sweep:
        raise nothing_finished(root)
    parts = [sweep, _pretraining(root, results)]
    _curve(root, results)
    parts.append(_staleness(root, results))
    if found:
        parts += [_finetuning(root, found), _usage(root, found)]
        _classes(root, found)
        write_compared(root, found)
    parts.append(write_seeds(root))
    write_processor_time(root)
    parts.append(_findings(root))
    return "\n\n".join([*filter(None, parts), f"tables and figures: {root}"])


def _pretraining(root: Path, results: dict[str, LmResults]) -> str:
    if not results:
        return "no model is finished yet"
    texts = list(dict.fromkeys(name for found in results.values() for name in found.splits))
    rows, raw = [], []
    layers: list[str] = []
    for run, found in results.items():
        splits = found.splits
        # Not every run needs to have been evaluated on every text: each one's last is its own.
        last = list(splits)[-1]
        use = splits[last].memory or {}
        use_on = last if use else ""
        layers = list(use) or layers
        ppl = [splits[text].perplexity if text in splits else None for text in texts]
        memory = use_cells(use.values())
        rows.append([words_of(run), *(f"{value:.2f}" if value else "" for value in ppl), *memory, use_on])
        reads = reads_a_slot(root / run, splits[last])
        head = [run, found.model.step, *ppl]
        raw += [
            [*head, layer, *(getattr(measured, name) for name in MemoryUse.NAMES), use_on, reads]
            for layer, measured in use.items()
        ]
        if not use:
            raw.append([*head, "", *("" for _ in MemoryUse.NAMES), use_on, ""])
    write_csv(
        root / "pretraining.csv", ["run", "updates", *texts, "layer", *MemoryUse.NAMES, "use_on", "reads_a_slot"], raw
    )
    text = markdown(["model", *(f"{text} ppl" for text in texts), *MemoryUse.HEADS, "use on"], rows)
    note = f"Use of the memories of layers {' / '.join(layers)} on the text of the last column." if layers else ""
    write_text(root / "pretraining.md", f"{text}\n\n{note}".rstrip())
    return f"{text}\n{note}".rstrip()


def _curve(root: Path, results: Iterable[str]) -> None:
    curves = {}
    # Those that are still trained have a curve, too.
    for run in dict.fromkeys([*MODELS, *results]):
        losses = metrics.points(list(RunDir(root / run).metrics.read("train")), metrics.VALID_LOSS)
        points = [(step, perplexity(loss)) for step, loss in losses]
        if points:
            curves[run] = points
    if not curves:
        return
    write_csv(
        root / "curve.csv", ["run", "update", "valid_perplexity"], [[run, *p] for run in curves for p in curves[run]]
    )
    # Figure 3 shows the low region: the worst final perplexity and half as much above it.
    top = 1.5 * max(points[-1][1] for points in curves.values())
    named = {words_of(run): points for run, points in curves.items()}
    seen = lowest_and_highest({name: points[-1][1] for name, points in named.items()}, "Perplexity on valid")
    write_picture(root / "curve.png", perplexity_curves(named, top, "masked token", seen))


def _staleness(root: Path, results: dict[str, LmResults]) -> str:
    rows, shares, edges, shown = [], {}, [0], []
    for run, found in results.items():
        for layer, last in (found.staleness or {}).items():
            edges = last.edges
            written: list[int] | list[str] = last.written or [""] * len(edges)
            rows += [[run, layer, *counts] for counts in zip(edges, last.slots, written, strict=True)]
            shares[f"{words_of(run)}, layer {layer}"] = [count / sum(last.slots) for count in last.slots]
            for words, counts in (("read first", last.slots), ("written", last.written or [])):
                if counts:
                    cells = (f"{100 * count / sum(counts):.1f}" for count in counts)
                    shown.append([f"{words_of(run)}, layer {layer}", words, *cells])
    if not shares:
        return ""
    write_csv(root / "staleness.csv", ["run", "layer", "last_read_first_up_to_update", "slots", "written"], rows)
    names = ["never", *(f"up to {edge}" for edge in edges[1:])]
    label = "share of the slots, by the update that last read them first"
    most = max(shares, key=lambda name: shares[name][0])
    seen = f"Slots that were never read first: at most {shares[most][0]:.1%} ({most})." if shares[most][0] else (
        "Every slot of every memory was read first at least once.")  # fmt: skip
    write_picture(root / "staleness.png", stacked_shares(shares, names, label, seen))
    table = markdown(["memory", "slots last", *names], shown)
    text = f"{table}\n\nIn % of the slots, by the updates of the training in which they were last read first, and "
    text += "last read at all, by which their values are written."
    write_text(root / "staleness.md", text)
    return text


def _finetunings(root: Path, results: Iterable[str]) -> Iterator[Finetuning]:
    for run in dict.fromkeys([*MODELS, *results]):
        for path in sorted((root / run / "finetune").glob("*/results.json")):
            yield Finetuning(run, path.parent, FinetuneResults.read(path))


def _finetuning(root: Path, found: list[Finetuning]) -> str:
    one = {task: next((each.results for each in found if each.task == task), None) for task in (*TASKS, "SQuAD")}
    metrics = {task: _METRICS.get(task, (first.metric,)) for task, first in one.items() if first}
    by = {(each.model, each.memory, each.task): each for each in found}

    def cell(task: str, scores: Scores) -> str:
        return " / ".join(_hundred(scores[metric]) for metric in metrics[task])

    majority = ["majority", "", *(cell(task, first.majority) for task, first in one.items() if first)]
    rows, raw = [majority], []
    for model, memory in dict.fromkeys((model, memory) for model, memory, _ in by):
        own = {task: each for task in metrics if (each := by.get((model, memory, task)))}
        rows.append([model, memory, *(cell(task, own[task].results.median) if task in own else "" for task in metrics)])
        raw += [[*line] for each in own.values() for line in _seeds(each)]
    head = ["run", "name", "memory", "task", "seed", "metric", "dev", "majority"]
    write_csv(root / "finetuning.csv", head, raw)
    text = markdown(["model", "memory", *(f"{task} ({' / '.join(names)})" for task, names in metrics.items())], rows)
    write_text(root / "finetuning.md", text)
    return text


def _seeds(each: Finetuning) -> Iterator[list[object]]:
    """Lines of finetuning.csv."""
    found = each.results
    metric = found.metric
    for seed, value in found.seeds.items():
        yield [each.run, found.name, each.memory, each.task, seed, metric, value.last[metric], found.majority[metric]]


def _usage(root: Path, found: list[Finetuning]) -> str:
    rows, raw = [], []
    for each in found:
        for layer, use in each.results.memory.items():
            measured = [getattr(use.after, name) for name in MemoryUse.NAMES]
            if each.memory == "updated":
                rows.append([each.model, each.task, layer, *use_cells([use.after])])
            raw.append([each.run, each.results.name, each.memory, each.task, layer, *measured])
    if not rows:
        return ""
    write_csv(root / "usage.csv", ["run", "name", "memory", "task", "layer", *MemoryUse.NAMES], raw)
    text = markdown(["model", "task", "layer", *MemoryUse.HEADS], rows)
    write_text(root / "usage.md", text)
    return text


def _classes(root: Path, found: list[Finetuning]) -> None:
    rows: list[list[object]] = []
    panels: dict[str, dict[str, dict[str, float | None]]] = {words: {} for words in _CLASS_WORDS.values()}
    for each in found:
        if each.task != "SST-2" or each.memory != "updated":
            continue
        for layer, use in each.results.memory.items():
            (before,), (after,) = ((side.labels or {}).values() for side in (use.before, use.after))
            for measure, words in _CLASS_WORDS.items():
                sides = {"before": getattr(before, measure), "after": getattr(after, measure)}
                rows.append([each.run, each.results.name, layer, measure, *sides.values()])
                panels[words][f"{each.model}\nlayer {layer}"] = sides
    if rows:
        write_csv(root / "classes.csv", ["run", "name", "layer", "measure", "before", "after"], rows)
        write_picture(root / "classes.png", grouped_bars(panels, _change_of_use(panels)))


def _change_of_use(panels: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """In how many memories each measure rises by the fine-tuning; those without a number are left out."""
    found = []
    for words, groups in panels.items():
        pairs = [(bars["before"], bars["after"]) for bars in groups.values()]
        known = [(before, after) for before, after in pairs if before is not None and after is not None]
        rising = sum(after > before for before, after in known)
        if known:
            found.append(f"{words.partition(',')[0]} rises in {rising} of {len(known)} memories")
    return f"With fine-tuning {', '.join(found)}." if found else "No measure has a value before and after fine-tuning."


def _findings(root: Path) -> str:
    found = rows(root)
    text = "\n".join(lines_of_rows((row.what, row, "") for row in found))
    if found:
        write_text(root / "findings.md", text)
    return text


def _hundred(value: float) -> str:
    return f"{100 * value:.1f}"
