"""Draws a genome: matrices with their numbers and equations, and a table of all other numbers.

A genome is small enough to read. The figure shows which state feeds which, what part of the
feedback reaches the synapses, and which numbers meta-training left near zero.

Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), equations 5 to 8 and
Table 1. Equation numbers are those of the paper. Rows and columns are those of the arrays of a
`Genome`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_blur.core.genome import Genome
from keras_blur.files import check_output
from keras_blur.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Symbol, equation, what it does, and what rows and columns are.
_MATRICES = {
    "nu": (r"$\nu$", "eq. 5", "forward", "source state", "target state"),
    "mu": (r"$\mu$", "eq. 6", "backward", "source state", "target state"),
    "nu_tilde": (r"$\tilde{\nu}$", "eq. 7", "pre-synaptic", "source state", "target channel"),
    "mu_tilde": (r"$\tilde{\mu}$", "eq. 7", "post-synaptic", "target channel", "source state"),
}
# Symbol and equation of the numbers common to all states.
_SHARED = {
    "neuron_keep": ("$f$", "eq. 5, 6"),
    "neuron_update": (r"$\eta$", "eq. 5, 6"),
    "synapse_keep": (r"$\tilde{f}$", "eq. 7"),
    "synapse_update": (r"$\tilde{\eta}$", "eq. 7"),
    "decay_power": (r"of $\tilde{\eta}$", "eq. 7"),
    "log_decay_steps": (r"of $\tilde{\eta}$", "eq. 7"),
    "log_damping": (r"$\ln \lambda$", "eq. W1"),
    "log_averaging": (r"$\ln e$", "averages"),
    "momentum": (r"$\beta$", "eq. 7"),
    "oja_multiplier": ("", "eq. 8"),
    "saturation": ("", "sec. 3.4"),
    "rescale": ("", "app. C.6"),
    "temperature": ("", "output"),
}
# Equation of the numbers of each state.
_OWN = {"forward_scale": "eq. 5", "forward_shift": "eq. 5", "backward_scale": "eq. 6", "backward_shift": "eq. 6"}

_WRITTEN = 8  # maximum number of states for which cells show their numbers
_LINE = 11.5  # points from one line of the table to the next
_TABLE = 3.2  # its width, inches


def draw_genome(genome: Genome, path: str | os.PathLike[str], title: str = "Genome") -> Figure:
    """Draws a genome: a heat map of each matrix, and a table of its other numbers.

    All matrices have the same colour scale, centred at zero. Cells show their numbers for up to 8
    states. Beyond that, a bar marks negative cells, so the figure is readable without colour.

    Args:
        genome: a single genome. If layers have their own numbers, each layer is a row. The matrices
            of a separate forward update are in a row below the others.
        path: output file: .png, .pdf or .svg.
        title: name of the genome.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: if the genome is a population, or the file has another suffix or cannot be
            written.
        ImportError: if matplotlib is not installed.

    Example:

    >>> import tempfile
    >>> from keras_blur import Rule
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     figure = draw_genome(Genome.random(Rule(states=3), seed=0), f"{folder}/genome.png")
    >>> [axis.get_title().splitlines()[1] for axis in figure.axes if axis.images]
    ['forward', 'backward', 'pre-synaptic', 'post-synaptic']
    """
    check_output("path", path, style.ENDINGS)
    rule = genome.rule
    if genome.population:
        raise ValueError(f"`genome` must be a single genome: draw each member by itself. Received: {genome!r}")
    layers = [genome] if rule.layers is None else [genome.layer(index) for index in range(rule.layer_count)]
    lines = [list(_MATRICES)]
    if rule.separate_forward_synapse:
        lines.append(["", "", "forward_nu_tilde", "forward_mu_tilde"])
    states = rule.states
    drawn = [name for line in lines for name in line if name]
    per_state = states + 4 if set(rule.shapes()) & set(_OWN) else 0
    side = max(1.45, 0.27 * min(states, _WRITTEN))
    table = (_LINE * (len(set(rule.shapes()) - set(drawn) - set(_OWN)) + 1 + per_state) + 10.0) / 72.0
    height = max(side + 1.05, table / len(lines) + 0.2)
    widths = [side + 0.5] * len(_MATRICES) + [_TABLE]
    made, axes = style.figure(columns=len(widths), rows=len(lines) * len(layers))
    made.set_size_inches(sum(widths), height * len(axes) + 0.9)
    grid = axes[0][0].get_gridspec()
    grid.set_width_ratios(widths)
    limit = max(float(np.abs(np.asarray(genome.arrays[name])).max()) for name in drawn) or 1.0
    images = []
    for number, own in enumerate(layers):
        first = number * len(lines)
        for line, row in zip(lines, axes[first : first + len(lines)], strict=True):
            for axis, name in zip(row, line, strict=False):
                if name:
                    images.append(_matrix(axis, name, np.asarray(own.arrays[name]), limit))
                else:
                    axis.axis("off")
            row[-1].remove()
        if rule.layers is not None:
            if isinstance(rule.layers, int):
                said = f"layer {number + 1}" + (" (output)" if number == rule.layers - 1 else "")
            else:
                said = f"layers {rule.layers[number]}"
            axes[first][0].set_ylabel(f"{said}\n\nsource state", fontsize=8)
        beside = made.add_subplot(grid[first : first + len(lines), -1])
        _table(beside, {name: np.asarray(array) for name, array in own.arrays.items() if name not in drawn})
    bar = made.colorbar(
        images[0], ax=axes[:, : len(_MATRICES)].ravel().tolist(), location="bottom", aspect=50, shrink=0.6, panchor=False
    )
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_linewidth(0.5)
    of = "" if rule.layers is None else f", {rule.layer_count} layers with their own"
    made.suptitle(f"{title}: {states} states, {genome.size} numbers{of}", fontsize=10)
    style.save(made, path)
    return made


def _matrix(axis: Any, name: str, values: np.ndarray, limit: float) -> Any:
    """Draws one matrix as a heat map with its numbers."""
    symbol, equation, role, rows, columns = _MATRICES[name.removeprefix("forward_")]
    image = axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    after = " (after forward)" if name.startswith("forward_") else ""
    axis.set_title(f"{symbol}   {equation}\n{role}{after}", fontsize=8.5)
    axis.set_ylabel(rows, fontsize=8)
    axis.set_xlabel(columns, fontsize=8)
    ticks = np.arange(0, len(values), max(1, len(values) // 8))
    for along in (axis.xaxis, axis.yaxis):
        along.set_ticks(ticks, ticks + 1, fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(True)
    axis.spines[:].set_linewidth(0.5)
    axis.grid(visible=False)
    axis.set_anchor("N")
    if len(values) <= _WRITTEN:
        size = 8.0 if len(values) <= 3 else 7.0 if len(values) <= 4 else 5.5
        for (row, column), value in np.ndenumerate(values):
            shade = "w" if abs(value) > 0.6 * limit else "k"
            axis.text(column, row, _short(value), ha="center", va="center", fontsize=size, color=shade)
    else:
        below = np.argwhere(values < 0)
        axis.scatter(below[:, 1], below[:, 0], s=600 / len(values), marker="_", color="k", linewidths=0.6)
    return image


def _short(value: float) -> str:
    """Formats a number with at most six characters."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.005 or size >= 999.5:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"


def _table(axis: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Draws the numbers outside matrices: first common ones, then one line for each state."""
    axis.axis("off")
    line = 0

    def write(x: float, text: str, align: str = "left", **look: Any) -> None:
        """Text on the current line, at `x` points from the left of the table."""
        axis.annotate(
            text, (0.0, 1.0), (x + 12, -_LINE * (line + 1)), xycoords="axes fraction", textcoords="offset points",
            ha=align, va="baseline", annotation_clip=False, **{"fontsize": 7, **look},
        )  # fmt: skip

    right = 72.0 * _TABLE - 28.0
    for x, head in ((0.0, "symbol"), (34.0, "number"), (130.0, "where")):
        write(x, head, weight="bold")
    write(right, "value", "right", weight="bold")
    for name, array in arrays.items():
        if name in _OWN:
            continue
        line += 1
        symbol, equation = _SHARED[name.removeprefix("forward_")]
        write(0, symbol)
        write(34, name)
        write(130, equation)
        write(right, f"{float(array):.4g}", "right")
    own = {name: array for name, array in arrays.items() if name in _OWN}
    if not own:
        return
    line += 2
    ends = [right - 46 * place for place in reversed(range(len(own)))]
    for part in range(2):  # such as "forward" above "scale"
        for x, name in zip(ends, own, strict=True):
            write(x, name.split("_")[part] + "_" * (1 - part), "right", weight="bold")
        line += 1
    write(0, "state", weight="bold")
    for x, name in zip(ends, own, strict=True):
        write(x, _OWN[name], "right")
    for state in range(len(next(iter(own.values())))):
        line += 1
        write(0, str(state + 1))
        for x, array in zip(ends, own.values(), strict=True):
            write(x, f"{array[state]:.4g}", "right")
