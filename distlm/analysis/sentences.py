"""What there is to see in a figure of the report, in one sentence that is computed from the data it shows."""

from collections.abc import Mapping, Sequence

import numpy as np

from distlm.analysis.plots.mixtures import skipped_at_random
from distlm.analysis.plots.style import Points
from distlm.knnlm.tune.records import GateCurve, Tuned
from distlm.models.perplexity import perplexities
from distlm.runtime.progress import format_seconds
from distlm.runtime.records import given


def of_training(train: Points, valid: Points) -> str:
    """Where the loss on valid is lowest, and what it does then; without valid, how the training loss changes."""
    if not valid:
        (first, before), (last, after) = train[0], train[-1]
        return f"The training loss goes from {before:.2f} (update {first}) to {after:.2f} (update {last})."
    step, lowest = min(valid, key=lambda point: point[1])
    last, after = valid[-1]
    if len(valid) == 1:
        return f"The loss on valid is {lowest:.2f} at update {step}."
    if step == last:
        return f"The loss on valid is lowest at its last measurement, {lowest:.2f} at update {step}."
    return f"The loss on valid is lowest at update {step} ({lowest:.2f}) and higher at the end ({after:.2f})."


def of_learning_rate(points: Points) -> str:
    """The peak and the end."""
    step, highest = max(points, key=lambda point: point[1])
    last, after = points[-1]
    if highest == min(value for _, value in points):
        return f"The rate is {highest:.3g} throughout."
    return f"The rate is highest at update {step} ({highest:.3g}) and {after:.3g} at update {last}."


def of_memory_use(use: Mapping[str, Points]) -> str:
    """How much of each memory is in use at the end, against the first line."""
    parts = []
    for name, points in use.items():
        (_, before), (_, after) = points[0], points[-1]
        how = "up from" if after > before else "down from" if after < before else "as much as in the first line,"
        parts.append(f"{name}: {after:.0%}, {how} {before:.0%}")
    return f"Slots read first at the end: {'; '.join(parts)}."


def of_weight(tuned: Tuned) -> str:
    """What the neighbours give on the tuned split, and what stands at the end of its grid."""
    weight, perplexity, alone = given(tuned.weight), given(tuned.perplexity), tuned.lm_perplexity
    if not weight or perplexity >= alone:
        said = f"Neighbours do not help on {tuned.split}: no λ above 0 is better than the LM's {alone:.2f}."
    else:
        chosen = f"λ = {weight:g}, T = {given(tuned.temperature):g}"
        said = f"{chosen} give {perplexity:.2f} instead of the LM's {alone:.2f}, {1 - perplexity / alone:.1%} less."
    return " ".join([said, *_edges(given(tuned.edges))])


def of_k(tuned: Tuned) -> str:
    """Whether more neighbours help."""
    grid = given(tuned.grid)
    best = dict(zip(grid.ks, perplexities(np.array(grid.loss_nats).min(axis=(1, 2))).tolist(), strict=True))
    (few, at_few), (many, at_many) = min(best.items()), max(best.items())
    lowest = min(best, key=lambda k: best[k])
    if lowest == many:
        return f"More neighbours help: {at_few:.2f} with {few}, {at_many:.2f} with {many}, the most that were tried."
    return f"{lowest} neighbours are best ({best[lowest]:.2f}); the {many} that were tried at most give {at_many:.2f}."


def of_theta(tuned: Tuned) -> str:
    """What the cache gives on the tuned split."""
    cache, alone = given(tuned.cache), tuned.lm_perplexity
    if not cache.weight or cache.perplexity >= alone:
        said = f"The cache does not help on {tuned.split}: the LM alone has {alone:.2f}."
    else:
        gives = f"θ = {cache.theta:g} with a window of {cache.window} gives {cache.perplexity:.2f}"
        said = f"{gives} instead of the LM's {alone:.2f}, {1 - cache.perplexity / alone:.1%} less."
    return " ".join([said, *_edges(cache.edges)])


def of_skips(curves: Mapping[str, GateCurve]) -> str:
    """What about half of the searches are worth, and whether the gate does better than chance."""
    parts = []
    for name, curve in curves.items():
        chance = skipped_at_random(curve)
        # Nothing skipped and all skipped are the same for both.
        inner = [place for place, share in enumerate(curve.skipped) if 0 < share < 1]
        if not inner:
            continue
        at = min(inner, key=lambda place: abs(curve.skipped[place] - 0.5))
        better = sum(curve.perplexity[place] < chance[place] for place in inner)
        parts.append(
            f"On {name} the perplexity is {curve.perplexity[at]:.2f} with {curve.skipped[at]:.0%} skipped, "
            f"{chance[at]:.2f} with as many skipped at random and {curve.perplexity[0]:.2f} with none; the gate beats "
            f"chance at {better} of {len(inner)} points"
        )
    return f"{'. '.join(parts)}." if parts else "The gate skips all searches or none."


def of_recall(points: Mapping[str, Points], split: str) -> str:
    """Whether the question with the highest recall has the lowest perplexity."""
    every = [point for own in points.values() for point in own]
    least, most = min(every), max(every, key=lambda point: (point[0], -point[1]))
    best = min(every, key=lambda point: point[1])
    if best[1] == most[1]:
        return (
            f"The highest recall, {most[0]:.3f}, has the lowest perplexity on {split}, {most[1]:.2f}; the lowest, "
            f"{least[0]:.3f}, has {least[1]:.2f}."
        )
    return (
        f"The lowest perplexity on {split}, {best[1]:.2f}, is had at recall {best[0]:.3f}; the highest recall, "
        f"{most[0]:.3f}, has {most[1]:.2f}."
    )


def of_time(seconds: Mapping[str, float]) -> str:
    """Which stage takes most."""
    total, longest = sum(seconds.values()), max(seconds, key=lambda stage: seconds[stage])
    return f"{longest} takes most: {seconds[longest] / (total or 1.0):.0%} of {format_seconds(total)}."


def lowest_and_highest(last: Mapping[str, float], what: str) -> str:
    """Which of several models ends lowest, and which highest."""
    low, high = (choose(last, key=lambda name: last[name]) for choose in (min, max))
    if last[low] == last[high]:
        return f"{what} is {last[low]:.2f} at the end of every line."
    return f"{what} ends lowest for {low} ({last[low]:.2f}) and highest for {high} ({last[high]:.2f})."


def _edges(edges: Sequence[str]) -> list[str]:
    """What tuning says of settings at the end of their grid, as sentences."""
    return [f"{edge[0].upper()}{edge[1:]}." for edge in edges]
