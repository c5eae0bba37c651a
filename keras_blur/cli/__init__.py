"""The shell: `keras-blur COMMAND [flags]`. One file a command, each with its flags; this one finds and runs it.

A user's mistake (a flag, a file, missing data) ends with one sentence and exit status 2; anything else is a bug and keeps
its traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

COMMANDS = {
    "fit": "train a network by a genome on images, beside Keras SGD",
    "meta-train": "find a genome on images or toy tasks, from random numbers",
    "reweight": "train on labels of which some are wrong, with weights of examples learned from a few right ones",
    "evaluate": "how a genome learns, over seeds and steps",
    "compare": "a genome beside tuned optimizers, on images or toy tasks",
    "zoo": "the trained genomes of the package, and their cards",
    "conformance": "replay published numbers and say how far they are apart",
}


def run(arguments: Sequence[str]) -> int:
    """Runs a command.

    Args:
        arguments: those after the program's name.

    Returns:
        The exit status: 0 success, 1 a check that failed, 2 a user's mistake.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: keras-blur COMMAND [flags]    (keras-blur COMMAND --help for its flags)\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<14} {purpose}")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        return _mistake("keras-blur", f"unknown command {name!r}; known: {', '.join(COMMANDS)}")
    command = importlib.import_module(f"keras_blur.cli.{name.replace('-', '_')}")
    return call(command, f"keras-blur {name}", COMMANDS[name], rest)


def call(command: Any, program: str, purpose: str, arguments: Sequence[str]) -> int:
    """Parses a command's flags and runs it.

    Args:
        command: a module with `USAGE`, `define_flags` and `run`.
        program: what stands before the arguments.
        purpose: what it does, in a line.
        arguments: those of the command.

    Returns:
        The exit status.
    """
    try:
        values = flags.FlagValues()
        flags.DEFINE_boolean("help", False, "Show these flags.", short_name="h", flag_values=values)
        command.define_flags(values)
        try:
            positional = values([program, *arguments])[1:]
        except flags.Error as error:
            return _mistake(program, f"{error} ({program} --help lists the flags)")
        if values["help"].value:
            print(f"usage: {program} {command.USAGE}\n\n{purpose}\n\n{values.get_help()}")
            return 0
        if positional and "..." not in command.USAGE:
            return _mistake(program, f"{program} takes flags only; received {' '.join(positional)!r}")
        return command.run(values, positional)
    except (ValueError, ImportError, OSError) as error:
        return _mistake(program, str(error))
    except KeyboardInterrupt:
        return _mistake(program, "interrupted")


def _mistake(program: str, text: str) -> int:
    print(f"{program.split()[0]}: {text}", file=sys.stderr)
    return 2


def main() -> None:
    """Entry point of the `keras-blur` script."""
    sys.exit(run(sys.argv[1:]))
