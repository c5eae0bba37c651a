"""Tables and figures of learning curves from `compare` and `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_blur.files import check_output
from keras_blur.report import style
from keras_blur.report.envelopes import GENOME, NORMALIZED_GENOME

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENVELOPES = {"plain": "best optimizer at each step", "normalized": "the same with batch normalisation"}
_SHOWN = ("SGD", "Adam")  # optimizers whose best setting a figure shows


def format_compare(result: Mapping[str, Any]) -> str:
    """Formats a result as a table of mean accuracy and standard deviation over seeds by step.

    Args:
        result: result of `compare` or `evaluate`. Its `name`, if any, replaces "genome".

    Returns:
        Lines of text. For a comparison they include the envelopes and speed-ups.

    Raises:
        KeyError: if the result lacks what `evaluate` returns.

    Example:

    >>> curve = {"accuracy": [[0.1, 0.5], [0.1, 0.7]], "loss": [[2.3, 1.0]] * 2, "seconds": [0.0, 0.1]}
    >>> result = {
    ...     "data": "digits", "network": "hidden 8", "batch_size": 16, "seeds": 2, "split": "test",
    ...     "steps": [0, 1], "curves": {"genome": curve},
    ... }
    >>> print(format_compare(result))
    digits, hidden 8, batch 16, 2 seeds: test accuracy by learning step, mean (and deviation over seeds)
                        0              1
    genome  0.100 (0.000)  0.600 (0.141)
    """
    at, curves = result["steps"], result["curves"]
    names = [name for name in curves if name.startswith("genome")]
    rows = [(label_of(result, name), _cells(curves[name])) for name in names]
    for variant, envelope in result.get("envelopes", {}).items():
        rows += [(f"best {name}", _cells(curves[name])) for name in result["best"][variant].values()]
        rows.append((f"envelope, {variant}", [f"{value:.3f}" for value in envelope["accuracy"]]))
        rows.append(("  reached by", envelope["which"]))
    about = f"{result['data']}, {result['network']}, batch {result['batch_size']}, {result['seeds']} seeds"
    lines = [f"{about}: {result['split']} accuracy by learning step, mean (and deviation over seeds)"]
    if "partial" in result:
        lines[0] += "; interrupted, so far:"
    lines += _table(["", *map(str, at)], rows)
    if "by_seconds" not in result:
        return "\n".join(lines)
    times = result["by_seconds"]["seconds"]
    lines += ["", "Accuracy at the seconds at which the fastest plain optimizer has done as many steps"]
    rows = [
        (label_of(result, name) if name.startswith("genome") else f"envelope, {name}", [f"{value:.3f}" for value in values])
        for name, values in result["by_seconds"].items()
        if name != "seconds"
    ]
    lines += [*_table(["", *map(str, at)], [("seconds", [f"{time:.3g}" for time in times]), *rows]), ""]
    lines.append(f"A step of {label_of(result, 'genome')} takes {_price(result)} of the fastest plain optimizer's time.")
    compared = [(GENOME, variant, ratios) for variant, ratios in result["speedup"].items()]
    if "normalized_speedup" in result:
        compared.append((NORMALIZED_GENOME, "normalized", result["normalized_speedup"]))
    for name, variant, ratios in compared:
        said = [f"{ratios[unit]:.2f} in {unit}" for unit in ("steps", "seconds") if ratios[unit] is not None]
        lines.append(
            f"Speed-up to the same accuracy (interquartile mean): {label_of(result, name)} against the {variant} envelope: "
            f"{', '.join(said) or 'none, no accuracy is reached by both'}"
        )
    for variant, edges in result["edges"].items():
        if edges:
            lines.append(f"At the edge of the grid, {variant}: {'; '.join(edges)}")
    return "\n".join(lines)


def _price(result: Mapping[str, Any]) -> str:
    own, base = result["curves"]["genome"]["seconds"][-1], result["by_seconds"]["seconds"][-1]
    return f"{own / base:.2f}"


def _cells(curve: Mapping[str, Any]) -> list[str]:
    values = np.array(curve["accuracy"])
    if len(values) == 1:
        return [f"{value:.3f}" for value in values[0]]
    return [f"{m:.3f} ({s:.3f})" for m, s in zip(values.mean(0), values.std(0, ddof=1), strict=True)]


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """Formats rows with the first column aligned left and all others right."""
    whole = [list(head), *([label, *cells] for label, cells in rows)]
    widths = [max(len(row[place]) for row in whole) for place in range(len(head))]
    for row in whole:
        yield row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))


def format_several(results: Sequence[Mapping[str, Any]], step: int = 10) -> str:
    """Formats several comparisons as a table: accuracies at `step`, and speed-ups in steps.

    `-` means that the two reach no common accuracy, or that there is no such envelope.
    """
    rows, means = [], []
    for result in results:
        nearest = max(place for place, at in enumerate(result["steps"]) if at <= step)
        values = np.array(result["curves"]["genome"]["accuracy"])[:, nearest]
        cells, found = [f"{values.mean():.3f} ({values.std(ddof=1):.3f})"], [float(values.mean())]
        for variant in ("plain", "normalized"):
            envelope = result["envelopes"].get(variant)
            found.append(envelope["accuracy"][nearest] if envelope else np.nan)
            cells.append(f"{found[-1]:.3f}" if envelope else "-")
        ratios = [result["speedup"].get(variant, {}).get("steps") for variant in ("plain", "normalized")]
        rows.append((result["data"], [*cells, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]))
        means.append(found)
    average = ["-" if np.isnan(one) else f"{one:.3f}" for one in np.mean(means, axis=0)]
    rows.append(("mean", [*average, "", ""]))
    head = ["task", f"genome at {step}", "plain envelope", "normalized envelope", "speed-up, plain", "speed-up, normalized"]
    return "\n".join(_table(head, rows))


def label_of(result: Mapping[str, Any], curve: str) -> str:
    """The label of a curve. `result["name"]`, if it exists, replaces "genome".

    Example:

    >>> label_of({"name": "fast"}, "genome"), label_of({}, "genome"), label_of({"name": "mine"}, "genome 3")
    ('fast', 'genome', 'mine 3')
    """
    return curve.replace("genome", result.get("name", "genome"), 1) if curve.startswith("genome") else curve


def plot_compare(result: Mapping[str, Any], path: str | os.PathLike[str]) -> Figure:
    """Draws accuracy by step and by time.

    The curves are the genomes and, for a comparison, the best settings of SGD and Adam and the
    envelopes of all optimizers.

    Args:
        result: result of `compare` or `evaluate`. Its `name`, if any, replaces "genome" in the
            legend.
        path: output file: .png, .pdf or .svg.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the file has another suffix or cannot be written.

    Example:

    >>> import tempfile
    >>> from keras_blur import Genome, Rule, report, tasks
    >>> genome = Genome.random(Rule(batch_reduction="mean"), seed=0)
    >>> result = report.evaluate(genome, tasks.functions("xor"), (8,), steps=2, seeds=2, batch_size=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = plot_compare({**result, "name": "mine"}, f"{folder}/curves.png")
    >>> figure.get_suptitle()
    'mine on xor, hidden 8, mean and deviation of 2 seeds'
    """
    check_output("path", path, style.ENDINGS)
    made, axes = style.figure(columns=2)
    at = np.array(result["steps"])
    genomes = [name for name in result["curves"] if name.startswith("genome")]
    best = result.get("best", {}).get("plain", {})
    shown = genomes + [best[optimizer] for optimizer in _SHOWN if optimizer in best]
    for panel, axis in enumerate(axes[0]):
        for index, name in enumerate(shown):
            curve = result["curves"][name]
            values = np.array(curve["accuracy"])
            x = at if panel == 0 else np.array(curve["seconds"])
            spread = values.std(0, ddof=1) if len(values) > 1 else None
            style.line(axis, index, x, values.mean(0), label_of(result, name), spread, (0.0, 1.0))
        for variant, envelope in result.get("envelopes", {}).items():
            x = at if panel == 0 else np.array(result["by_seconds"]["seconds"])
            y = envelope["accuracy"] if panel == 0 else result["by_seconds"][variant]
            style.backdrop(axis, list(_ENVELOPES).index(variant), x, y, _ENVELOPES[variant])
        if panel == 0:
            style.step_axis(axis, at[-1])
        else:
            style.time_axis(axis, [result["curves"][name]["seconds"] for name in shown])
        axis.set_xlabel("learning step" if panel == 0 else "time to learn one network (s)")
        axis.set_ylabel(f"{result['split']} accuracy")
    style.legend(made, axes[0][0])
    alone = f"{label_of(result, genomes[0])} on " if len(genomes) == 1 else ""
    made.suptitle(
        f"{alone}{result['data']}, {result['network']}, mean and deviation of "
        f"{result['seeds']} seeds" + (" (interrupted)" if "partial" in result else ""),
        fontsize=10,
    )
    style.save(made, path)
    return made
