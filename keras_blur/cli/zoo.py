"""`keras-blur zoo`: lists the trained genomes of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keras_blur import genomes
from keras_blur.cli.flags import PICTURES, Flags
from keras_blur.cli.outputs import Table, wrote

USAGE = "[NAME ...] [flags]"
EXAMPLES = ("", "mnist-4state --describe", "mnist-4state --plot genome.png --save copy.json")


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    flags.group("Outputs")
    flags.switch("describe", False, "Whether to also print the rule of each named genome as equations with its numbers.")
    flags.output("save", None, "File for a copy of the named genome.", (".json",))
    flags.output("plot", None, "File for a figure of the named genome.", PICTURES)


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Lists the genomes, or prints the cards of the named ones."""
    if (flag["save"] or flag["plot"]) and len(positional) != 1:
        raise ValueError(f"--save and --plot need the name of one genome. Received: {' '.join(positional) or 'none'}")
    if flag["describe"] and not positional:
        raise ValueError("--describe needs the name of a genome. Received: none")
    if not positional:
        table = Table({"name": 17, "states": -6, "numbers": -9, "  card": 0})
        for name in genomes.names():
            genome = genomes.load(name)
            title = genomes.card(name).splitlines()[0].lstrip("# ")
            table.row(name, str(genome.rule.states), str(genome.size), f"  {title}")
        return 0
    cards = [genomes.card(name) for name in positional]
    for name, card in zip(positional, cards, strict=True):
        print(card)
        if flag["describe"]:
            print(genomes.load(name).describe())
    if flag["save"]:
        genomes.load(positional[0]).save(flag["save"])
        wrote(flag["save"])
    if flag["plot"]:
        from keras_blur.report.genome import draw_genome

        draw_genome(genomes.load(positional[0]), flag["plot"], positional[0])
        wrote(flag["plot"])
    return 0
