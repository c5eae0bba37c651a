"""`keras-blur zoo`: the trained genomes of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

from keras_blur import genomes
from keras_blur.cli.common import check_folders, values_of

USAGE = "[NAME ...] [flags]"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    define: Any = {"flag_values": values}
    flags.DEFINE_boolean("describe", False, "Whether to print the rule as equations with its numbers, too.", **define)
    flags.DEFINE_string("save", None, "File (.json) to copy the one named genome to.", **define)
    flags.DEFINE_string("plot", None, "File for a picture of the one named genome (.png, .pdf, .svg).", **define)


def run(values: flags.FlagValues, positional: Sequence[str]) -> int:
    """Lists the genomes, or shows the cards of those that are named."""
    flag = values_of(values)
    check_folders(flag, "save", "plot")
    if (flag["save"] or flag["plot"]) and len(positional) != 1:
        raise ValueError(f"--save and --plot need the name of one genome. Received: {' '.join(positional) or 'none'}")
    if not positional:
        for name in genomes.names():
            genome = genomes.load(name)
            title = genomes.card(name).splitlines()[0].lstrip("# ")
            print(f"{name:<16} {genome.rule.states} states, {genome.size} numbers  {title}")
        return 0
    for name in positional:
        print(genomes.card(name))
        if flag["describe"]:
            print(genomes.load(name).describe())
    if flag["save"]:
        genomes.load(positional[0]).save(flag["save"])
        print(f"wrote {flag['save']}")
    if flag["plot"]:
        from keras_blur.report.genome import draw_genome

        draw_genome(genomes.load(positional[0]), flag["plot"])
        print(f"wrote {flag['plot']}")
    return 0
