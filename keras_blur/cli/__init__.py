"""The command line: `keras-blur COMMAND [flags]`. Each command is one module with its flags.

A user error (a flag, a file, missing data) prints one sentence and exits with status 2. Ctrl-C
exits with 130. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import keras

from keras_blur._version import __version__
from keras_blur.cli import outputs
from keras_blur.cli.flags import Flags

GROUPS = {
    "Train a network": {
        "fit": "train a network on images with a genome, and with tuned Keras optimizers",
        "reweight": "train on partly wrong labels, with example weights learned from a few correct labels",
    },
    "Learn a genome": {
        "meta-train": "meta-learn a genome or another learner",
    },
    "Score a genome": {
        "evaluate": "score a genome over seeds and steps",
        "compare": "compare a genome with tuned optimizers, on images or toy tasks",
    },
    "Look and check": {
        "zoo": "list the ready-made genomes of the package and their cards",
        "conformance": "replay published numbers and report the differences",
    },
}
COMMANDS = {name: purpose for commands in GROUPS.values() for name, purpose in commands.items()}
EXAMPLES = (
    "fit --plot fit.png",
    "meta-train --epochs 32 --genome mine.json",
    "compare --genome mine.json --optimizers SGD,Adam --plot compare.png",
)

_BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX"}

MISTAKE = 2
STATUS = "Exit status: 0 success, 1 a check that failed, 2 a mistake in flags, files or data, 130 interrupted (Ctrl-C)."


def run(arguments: Sequence[str]) -> int:
    """Runs a command.

    Args:
        arguments: the arguments after the program's name.

    Returns:
        The exit status: 0 for success, 1 for a failed check, 2 for a user error, 130 if
            interrupted.
    """
    if arguments and arguments[0] == "--version":
        backend = keras.backend.backend()
        version = importlib.import_module(backend).__version__
        print(f"keras-blur {__version__} ({_BACKENDS[backend]} {version}, Keras {keras.__version__})")
        return 0
    if arguments and arguments[0] == "help" and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else MISTAKE
    name, *rest = arguments
    if name not in COMMANDS:
        return _mistake("keras-blur", f"unknown command {name!r}; known commands: {', '.join(COMMANDS)}")
    command = importlib.import_module(f"keras_blur.cli.{name.replace('-', '_')}")
    return call(command, f"keras-blur {name}", COMMANDS[name], rest)


def _help() -> str:
    """The help of the program: commands by purpose."""
    usage = "usage: keras-blur COMMAND [flags]    (keras-blur COMMAND --help for its flags and examples)"
    groups = [
        "\n".join([f"{title}:", *(f"  {name:<14} {purpose}" for name, purpose in commands.items())])
        for title, commands in GROUPS.items()
    ]
    examples = "\n".join(["Examples:", *(f"  keras-blur {example}" for example in EXAMPLES)])
    general = f"General:\n  {'--version':<14} the versions of keras_blur, of Keras and of its backend"
    return "\n\n".join([usage, *groups, general, examples, STATUS])


def call(command: Any, program: str, purpose: str, arguments: Sequence[str]) -> int:
    """Parses and checks the flags of a command and runs it.

    Args:
        command: a module with `USAGE`, `EXAMPLES`, `define_flags` and `run`, and optionally
            `complete`, which fills in defaults that depend on other flags.
        program: name of the program, for messages.
        purpose: one-line description of the command.
        arguments: arguments of the command.

    Returns:
        The exit status.
    """
    outputs.written.clear()
    try:
        flags = Flags()
        command.define_flags(flags)
        positional = flags.parse(program, arguments)
        if flags.wants_help:
            examples = "\n".join(f"  {program} {example}" for example in command.EXAMPLES)
            print(f"usage: {program} {command.USAGE}\n\n{purpose}\n\nExamples:\n{examples}\n\n{flags.help()}\n\n{STATUS}")
            return 0
        if positional and "..." not in command.USAGE:
            return _mistake(program, f"{program} takes flags only; received {' '.join(positional)!r}")
        flag = flags.values()
        if hasattr(command, "complete"):
            command.complete(flag, flags.given())
        flags.check(flag)
        flags.check_outputs(flag)
        return command.run(flag, positional)
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so the flush at exit no longer fails
        return 0
    except MemoryError:
        return _mistake(program, "out of memory; use a smaller batch or network")
    except (ValueError, ImportError, OSError) as error:
        return _mistake(program, _sentence(error))
    except KeyboardInterrupt:
        return outputs.interrupted("nothing was kept")
    except Exception as error:
        if not _exhausted(error):
            raise
        return _mistake(program, f"out of memory; use a smaller batch or network ({_sentence(error)})")


def _exhausted(error: Exception) -> bool:
    """Whether TensorFlow or JAX ran out of memory."""
    tensorflow, jax = sys.modules.get("tensorflow"), sys.modules.get("jax")
    if tensorflow is not None and isinstance(error, tensorflow.errors.ResourceExhaustedError):
        return True
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _sentence(error: Exception) -> str:
    """The message of an error as one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename!r}" if error.filename else "")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith((":", ",")) else lines[0]


def _mistake(program: str, text: str) -> int:
    print(f"{program.split()[0]}: {text}", file=sys.stderr)
    return MISTAKE


def main() -> None:
    """Entry point of the `keras-blur` script."""
    sys.exit(run(sys.argv[1:]))
