"""The tables and figures of `distlm reproduce pkm-plm` (Kim & Jung 2020), from what is finished in its folder.

pretraining.md, .csv   table 2: perplexity of masked tokens and use of the memories on held-out text
curve.png, .csv        figure 3: perplexity on valid over the updates
staleness.png, .csv    figure 2: when slots were last read first
finetuning.md, .csv    tables 4 and 5: medians on dev, memory updated and frozen
usage.md, .csv         table 6: use of the memories on dev after fine-tuning
classes.png, .csv      figure 4: how differently the labels of SST-2 use the slots, before and after
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distlm.analysis import plots
from distlm.analysis.tables import markdown, write_csv, write_picture, write_text
from distlm.runtime import metrics
from distlm.runtime.files import read_json
from distlm.runtime.rundir import RunDir
from distlm.training.finished import RESULT

MODELS = {
    "dense": "dense", "init": "+Init (dense, as long again)", "pkm": "+PKM", "resm": "+ResM", "init-pkm": "+Init +PKM",
    "init-resm": "+Init +ResM", "init-resm-fresh": "+Init +ResM′",
}  # fmt: skip
"""Run → what Kim & Jung call it."""
TASKS = ("SST-2", "CoLA", "MRPC", "RTE")
_USE = ("mu", "top1_mu", "kl_u", "kl_w")
_USE_WORDS = ("MU %", "top-1 MU %", "KL_u", "KL_w")


def write_tables(root: Path) -> str:
    """Write what there is the data for; the tables as text."""
    results = {run: read_json(root / run / RESULT, "evaluation results")
               for run in MODELS if (root / run / RESULT).exists()}  # fmt: skip
    parts = [_pretraining(root, results)]
    _curve(root)
    _staleness(root, results)
    found = list(_finetunings(root))
    if found:
        parts += [_finetuning(root, found), _usage(root, found)]
        _classes(root, found)
    return "\n\n".join([*filter(None, parts), f"tables and figures: {root}"])


def _pretraining(root: Path, results: dict[str, Any]) -> str:
    if not results:
        return "no model is finished yet"
    texts = list(dict.fromkeys(name for found in results.values() for name in found["splits"]))
    rows, raw = [], []
    for run, found in results.items():
        splits, use = found["splits"], found["splits"][texts[-1]]["memory"]
        ppl = [splits[text]["perplexity"] if text in splits else None for text in texts]
        memory = [" / ".join(_share(name, layer[name]) for layer in use.values()) for name in _USE]
        rows.append([MODELS[run], *(f"{value:.2f}" if value else "" for value in ppl), *memory])
        for layer, measured in use.items() or [("", dict.fromkeys(_USE, ""))]:
            raw.append([run, found["model"]["step"], *ppl, layer, *(measured[name] for name in _USE)])
    layers = next((list(found["splits"][texts[-1]]["memory"]) for found in reversed(results.values())), [])
    write_csv(root / "pretraining.csv", ["run", "updates", *texts, "layer", *_USE], raw)
    text = markdown(["model", *(f"{text} ppl" for text in texts), *_USE_WORDS], rows)
    note = f"Use of the memories of layers {' / '.join(layers)} on {texts[-1]}." if layers else ""
    write_text(root / "pretraining.md", f"{text}\n\n{note}".rstrip())
    return f"{text}\n{note}".rstrip()


def _share(name: str, value: float) -> str:
    return f"{100 * value:.1f}" if name in ("mu", "top1_mu") else f"{value:.2f}"


def _curve(root: Path) -> None:
    curves = {}
    for run in MODELS:
        lines = RunDir(root / run).metrics.read("train")
        points = [(line["step"], math.exp(line[metrics.VALID_LOSS])) for line in lines
                  if metrics.VALID_LOSS in line]  # fmt: skip
        if points:
            curves[run] = points
    if not curves:
        return
    write_csv(
        root / "curve.csv", ["run", "update", "valid_perplexity"], [[run, *p] for run in curves for p in curves[run]]
    )
    # Figure 3 shows the low region: the worst final perplexity and half as much above it.
    top = 1.5 * max(points[-1][1] for points in curves.values())
    write_picture(root / "curve.png", plots.perplexity_curves({MODELS[run]: curves[run] for run in curves}, top))


def _staleness(root: Path, results: dict[str, Any]) -> None:
    rows, shares, edges = [], {}, [0]
    for run, found in results.items():
        for layer, last in found.get("staleness", {}).items():
            edges = last["edges"]
            rows += [[run, layer, edge, count] for edge, count in zip(edges, last["slots"], strict=True)]
            shares[f"{MODELS[run]}, layer {layer}"] = [count / sum(last["slots"]) for count in last["slots"]]
    if not shares:
        return
    write_csv(root / "staleness.csv", ["run", "layer", "last_read_first_up_to_update", "slots"], rows)
    names = ["never", *(f"up to {edge}" for edge in edges[1:])]
    write_picture(
        root / "staleness.png", plots.stacked_shares(shares, names, "slots, by the update that last read them first")
    )


def _finetunings(root: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Run, `updated`, `frozen` or empty, results of a fine-tuning."""
    for run in MODELS:
        for path in sorted((root / run / "finetune").glob("*/results.json")):
            results = read_json(path, "fine-tuning results")
            yield run, results["memory_values"] or "", results


def _finetuning(root: Path, found: list[tuple[str, str, dict[str, Any]]]) -> str:
    tasks = [task for task in TASKS if any(results["task"] == task for _, _, results in found)]
    by = {(run, memory, results["task"]): results for run, memory, results in found}
    one = {task: next(results for _, _, results in found if results["task"] == task) for task in tasks}
    majority = ["majority", "", *(_hundred(one[task]["majority"][one[task]["metric"]]) for task in tasks)]
    rows, raw = [majority], []
    for run, memory in dict.fromkeys((run, memory) for run, memory, _ in found):
        cells = [by.get((run, memory, task)) for task in tasks]
        rows.append(
            [MODELS[run], memory, *(_hundred(cell["median"][cell["metric"]]) if cell else "" for cell in cells)]
        )
        raw += [[run, memory, cell["task"], seed, cell["metric"], value["last"][cell["metric"]],
                 cell["majority"][cell["metric"]]]
                for cell in cells if cell for seed, value in cell["seeds"].items()]  # fmt: skip
    write_csv(root / "finetuning.csv", ["run", "memory", "task", "seed", "metric", "dev", "majority"], raw)
    head = ["model", "memory", *(f"{task} ({one[task]['metric']})" for task in tasks)]
    text = markdown(head, rows)
    write_text(root / "finetuning.md", text)
    return text


def _usage(root: Path, found: list[tuple[str, str, dict[str, Any]]]) -> str:
    rows, raw = [], []
    for run, memory, results in found:
        for layer, use in results["memory"].items():
            if memory == "updated":
                cells = [_share(name, use["after"][name]) for name in _USE]
                rows.append([MODELS[run], results["task"], layer, *cells])
            raw.append([run, memory, results["task"], layer, *(use["after"][name] for name in _USE)])
    if not rows:
        return ""
    write_csv(root / "usage.csv", ["run", "memory", "task", "layer", *_USE], raw)
    text = markdown(["model", "task", "layer", *_USE_WORDS], rows)
    write_text(root / "usage.md", text)
    return text


def _classes(root: Path, found: list[tuple[str, str, dict[str, Any]]]) -> None:
    rows, groups = [], {}
    for run, memory, results in found:
        if results["task"] != "SST-2" or memory != "updated":
            continue
        for layer, use in results["memory"].items():
            (before,), (after,) = (use[when]["labels"].values() for when in ("before", "after"))
            rows += [[run, layer, name, before[name], after[name]] for name in ("kl", "iou")]
            groups[f"{MODELS[run]}\nlayer {layer}"] = {"before": before["kl"], "after": after["kl"]}
    if groups:
        write_csv(root / "classes.csv", ["run", "layer", "measure", "before", "after"], rows)
        write_picture(root / "classes.png", plots.grouped_bars(groups, "KL between the labels' use, nats"))


def _hundred(value: float) -> str:
    return f"{100 * value:.1f}"
