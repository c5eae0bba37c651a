"""`keras-blur zoo`: lists the ready-made genomes of the package, and exports them."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from keras_blur import genomes
from keras_blur.cli.flags import PICTURES, Flags, without
from keras_blur.cli.outputs import Table, write_json, wrote
from keras_blur.core.genome import Genome
from keras_blur.files import check_output, make_folder, write_text

USAGE = "[NAME ...] [flags]"
EXAMPLES = ("mnist-4state --describe", "mnist-4state --plot genome.png --save copy.json", "--export genomes")


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    flags.group("Outputs")
    flags.switch(
        "describe", False, "Whether to also print each named genome as equations with its numbers.", [without("export")]
    )
    flags.string(
        "export", None, "Folder for the named genomes, by default all: NAME.json, and the card NAME.md.", writes=True
    )
    flags.output("json", None, "File for names, sizes, licences and cards.", (".json",))
    flags.output("save", None, "File for a copy of the named genome.", (".json",))
    flags.output("plot", None, "File for a figure of the named genome.", PICTURES)


def run(flag: Mapping[str, Any], positional: Sequence[str]) -> int:
    """Lists the genomes, or prints the cards of the named ones, and writes the requested files."""
    if (flag["save"] or flag["plot"]) and len(positional) != 1:
        raise ValueError(f"--save and --plot need the name of one genome. Received: {' '.join(positional) or 'none'}")
    if flag["describe"] and not positional:
        raise ValueError("--describe needs the name of a genome. Received: none")
    cards = {name: genomes.card(name) for name in positional or genomes.names()}
    known = {name: genomes.load(name) for name in cards}
    if flag["export"]:
        _export(known, cards, flag["export"], flag["overwrite"])
    elif not positional:
        table = Table({"name": 17, "states": -6, "numbers": -9, "  card": 0})
        for name, genome in known.items():
            table.row(name, str(genome.rule.states), str(genome.size), f"  {_title(cards[name])}")
    else:
        for name, genome in known.items():
            print(cards[name])
            if flag["describe"]:
                print(genome.describe())
    if flag["json"]:
        facts = [
            {
                "name": name,
                "title": _title(cards[name]),
                "states": genome.rule.states,
                "numbers": genome.size,
                "license": genome.license,
                "card": cards[name],
            }
            for name, genome in known.items()
        ]
        write_json(flag["json"], facts)
    if flag["save"]:
        known[positional[0]].save(flag["save"])
        wrote(flag["save"])
    if flag["plot"]:
        from keras_blur.report.genome import draw_genome

        draw_genome(known[positional[0]], flag["plot"], positional[0])
        wrote(flag["plot"])
    return 0


def _title(card: str) -> str:
    return card.splitlines()[0].lstrip("# ")


def _export(known: Mapping[str, Genome], cards: Mapping[str, str], folder: str, overwrite: bool) -> None:
    """Makes a folder and writes genomes and cards to it, after a check of all paths."""
    make_folder(folder)
    files = {name: (posixpath.join(folder, f"{name}.json"), posixpath.join(folder, f"{name}.md")) for name in known}
    for path in (path for pair in files.values() for path in pair):
        check_output("--export", path, overwrite=overwrite)
    for name, (file, card) in files.items():
        known[name].save(file)
        wrote(file)
        write_text(card, cards[name])
        wrote(card)
