"""Flags of a command: help groups, conditions and output files.

Each flag declares when it applies, since a flag that a run would ignore is an error. absl parses
the command line. Its errors are rewritten as one sentence with the flag, the expected and the
received value.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags as absl_flags

from keras_blur.files import check_output, exists, is_remote
from keras_blur.report.style import require_matplotlib

PICTURES = (".png", ".pdf", ".svg")

_WIDTH = 100  # columns of the help


@dataclasses.dataclass(frozen=True)
class When:
    """A condition under which a flag applies.

    Attributes:
        text: the condition in words, to follow "applies only".
        holds: tells from the values of all flags whether the condition holds.
        shown: flags whose values an error shows.
    """

    text: str
    holds: Callable[[Mapping[str, Any]], bool]
    shown: tuple[str, ...] = ()


def with_any(*names: str) -> When:
    """A condition that at least one of the named flags is set."""
    text = " or ".join(f"--{name}" for name in names)
    return When(f"with {text}", lambda flag: any(_is_set(flag[name]) for name in names))


def without(*names: str) -> When:
    """A condition that none of the named flags is set."""
    text = " or ".join(f"--{name}" for name in names)
    return When(f"without {text}", lambda flag: not any(_is_set(flag[name]) for name in names), names)


def with_value(name: str, *values: str) -> When:
    """A condition that a flag has one of these values."""
    return When(f"with --{name}={' or '.join(values)}", lambda flag: flag[name] in values, (name,))


def unless_value(name: str, *values: str) -> When:
    """A condition that a flag has none of these values."""
    return When(f"without --{name}={' or '.join(values)}", lambda flag: flag[name] not in values, (name,))


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != []


class Output(NamedTuple):
    """A flag for an output file."""

    flag: str
    endings: tuple[str, ...]
    resumed: bool  # read first if it exists, to resume training
    beside: str | None  # name of a second such file, as in `beside`
    beside_with: str | None  # the switch with which there is one


def beside(path: str, name: str) -> str:
    """The path of a second file for the same flag.

    Args:
        path: the first file.
        name: what tells the second file from it.

    Example:

    >>> beside("folder/run.weights.h5", "plain")
    'folder/run.plain.weights.h5'
    """
    folder, slash, file = path.rpartition("/")
    stem, *endings = file.split(".")
    if len(endings) > 2:
        stem, endings = ".".join([stem, *endings[:-2]]), endings[-2:]
    return folder + slash + ".".join([stem, name, *endings])


@dataclasses.dataclass(frozen=True)
class _Flag:
    group: str
    default: str
    text: str
    expected: str
    when: tuple[When, ...]
    endings: tuple[str, ...] | None = None
    resumed: bool = False
    beside: str | None = None
    beside_with: str | None = None
    writes: bool = False


class Flags:
    """The flags of a command.

    Each flag belongs to the last group started. `when` lists the conditions under which a flag
    applies; all must hold. Commands with output files also have `--overwrite`.

    Example:

    >>> flags = Flags()
    >>> flags.group("Learning")
    >>> flags.integer("epochs", 5, "Passes over the training images.", least=1)
    >>> flags.parse("program", ["--epochs=2"]), flags.values()
    ([], {'epochs': 2})
    >>> flags.parse("program", ["--epochs=0"])
    Traceback (most recent call last):
    ValueError: --epochs must be a whole number from 1. Received: --epochs=0
    """

    def __init__(self) -> None:
        self._absl = absl_flags.FlagValues()
        self._known: dict[str, _Flag] = {}
        self._group = ""
        self.group("General")
        self.switch("help", False, "Show this help and exit.", short_name="h")

    def group(self, name: str) -> None:
        """Starts or continues a group of the help."""
        self._group = name

    def string(self, name: str, default: str | None, text: str, when: Sequence[When] = (), writes: bool = False) -> None:
        """Defines a string flag. `writes`: whether `--overwrite` applies to what it names."""
        absl_flags.DEFINE_string(name, default, text, flag_values=self._absl)
        self._add(name, default, text, "a text", when, writes=writes)

    def integer(
        self, name: str, default: int | None, text: str, least: int | None = None, when: Sequence[When] = ()
    ) -> None:
        """Defines an integer flag."""
        absl_flags.DEFINE_integer(name, default, text, lower_bound=least, flag_values=self._absl)
        self._add(name, default, text, "a whole number" + ("" if least is None else f" from {least}"), when)

    def number(
        self,
        name: str,
        default: float | None,
        text: str,
        least: float | None = None,
        most: float | None = None,
        when: Sequence[When] = (),
    ) -> None:
        """Defines a flag for a finite number."""
        absl_flags.DEFINE_float(name, default, text, least, most, flag_values=self._absl)
        expected = "a number" + ("" if least is None else f" from {least:g}") + ("" if most is None else f" to {most:g}")
        self._add(name, default, text, expected, when)

    def switch(self, name: str, default: bool, text: str, when: Sequence[When] = (), short_name: str | None = None) -> None:
        """Defines a boolean flag: `--name` or `--noname`."""
        absl_flags.DEFINE_boolean(name, default, text, short_name=short_name, flag_values=self._absl)
        self._add(name, default, text, "given without a value", when)

    def choice(self, name: str, default: str | None, choices: Sequence[str], text: str, when: Sequence[When] = ()) -> None:
        """Defines a flag with fixed choices."""
        absl_flags.DEFINE_enum(name, default, choices, text, flag_values=self._absl)
        self._add(name, default, f"{text} One of {', '.join(choices)}.", f"one of {', '.join(choices)}", when)

    def words(self, name: str, default: Sequence[str] | None, text: str, when: Sequence[When] = ()) -> None:
        """Defines a flag for a comma-separated list."""
        absl_flags.DEFINE_list(name, default, text, flag_values=self._absl)
        self._add(name, ",".join(default or ()), text, "a comma-separated list", when)

    def repeated(self, name: str, default: Sequence[str], text: str, when: Sequence[When] = ()) -> None:
        """Defines a string flag that can be repeated."""
        absl_flags.DEFINE_multi_string(name, default, text, flag_values=self._absl)
        self._add(name, " ".join(default), text, "a text", when)

    def output(
        self,
        name: str,
        default: str | None,
        text: str,
        endings: tuple[str, ...],
        when: Sequence[When] = (),
        resumed: bool = False,
        beside: str | None = None,
        beside_with: str | None = None,
    ) -> None:
        """Defines a flag for an output file.

        Args:
            name: name of the flag.
            default: default file; `None` for no file.
            text: help text.
            endings: allowed suffixes.
            when: conditions, as for all flags.
            resumed: whether an existing file is read first and training resumes from it.
            beside: name of a second such file, which the function `beside` puts next to the first.
            beside_with: the switch with which there is a second file.
        """
        absl_flags.DEFINE_string(name, default, text, flag_values=self._absl)
        shown = f"{text.rstrip('.')} ({', '.join(endings)})."
        second = {"beside": beside, "beside_with": beside_with}
        self._add(name, default, shown, "a file", when, endings=endings, resumed=resumed, **second, writes=True)
        if "overwrite" not in self._known:
            self.switch("overwrite", False, "Replace existing output files.")
        writing = [one for one, known in self._known.items() if known.writes]
        always = any(self._known[one].default for one in writing)
        when = () if always else (with_any(*writing),)
        self._known["overwrite"] = dataclasses.replace(self._known.pop("overwrite"), when=when)  # the last in the help

    def _add(
        self,
        name: str,
        default: Any,
        text: str,
        expected: str,
        when: Sequence[When],
        **output: Any,
    ) -> None:
        said = "" if default in (None, "") or isinstance(default, bool) else str(default)
        negated = "no" if default is True else ""
        self._known[name] = _Flag(self._group, negated + said, text, expected, tuple(when), **output)

    def parse(self, program: str, arguments: Sequence[str]) -> list[str]:
        """Parses the command line and returns the positional arguments.

        Raises:
            ValueError: if a flag is unknown, has no value, or has an invalid one.
        """
        try:
            positional = self._absl([program, *arguments])[1:]
        except absl_flags.UnrecognizedFlagError as error:
            near = difflib.get_close_matches(error.flagname, self._known, n=1)
            guess = f"; did you mean --{near[0]}?" if near else f" ({program} --help lists the flags)"
            raise ValueError(f"Unknown command line flag '{error.flagname}'{guess}") from error
        except absl_flags.IllegalFlagValueError as error:
            found = re.match(r"flag --(\w+)=(.*): ", str(error), re.DOTALL)
            if not found or found[1] not in self._known:
                raise
            raise ValueError(
                f"--{found[1]} must be {self._known[found[1]].expected}. Received: --{found[1]}={found[2]}"
            ) from error
        except absl_flags.Error as error:
            raise ValueError(f"{error}; {program} --help lists the flags") from error
        for name in self._known:
            if isinstance(value := self._absl[name].value, float) and not math.isfinite(value):
                raise ValueError(f"--{name} must be {self._known[name].expected}. Received: --{name}={value}")
        return positional

    @property
    def wants_help(self) -> bool:
        """Whether help was requested."""
        return bool(self._absl["help"].value)

    def given(self) -> set[str]:
        """The flags given on the command line."""
        return {name for name in self._known if self._absl[name].present}

    def values(self) -> dict[str, Any]:
        """The values of all flags by name."""
        return {name: self._absl[name].value for name in self._known if name != "help"}

    def check(self, flag: Mapping[str, Any]) -> None:
        """Checks that each given flag applies.

        Args:
            flag: values of all flags, with defaults filled in.

        Raises:
            ValueError: if a flag would be ignored.
        """
        for name in sorted(self.given() - {"help"}):
            for when in self._known[name].when:
                if not when.holds(flag):
                    came = [_shown(other, flag[other]) for other in when.shown if _is_set(flag[other])]
                    own = f"--no{name}" if flag[name] is False else f"--{name}"
                    received = ", ".join([_shown(name, flag[name]), *came])
                    raise ValueError(f"{own} applies only {when.text}. Received: {received}")

    def check_outputs(self, flag: Mapping[str, Any]) -> None:
        """Checks the output files of a run.

        A run that resumes replaces the outputs of the interrupted run without `--overwrite`.

        Args:
            flag: values of all flags, with defaults filled in.

        Raises:
            ValueError: if a file cannot be written, exists without `--overwrite`, or is named
                twice.
            ImportError: if a figure is to be drawn and matplotlib is not installed.
        """
        outputs = [
            output
            for output in self.outputs()
            if flag[output.flag] is not None and all(when.holds(flag) for when in self._known[output.flag].when)
        ]
        if any(output.endings == PICTURES for output in outputs):
            require_matplotlib()
        files = [(output, path) for output in outputs for path in _files_of(output, flag)]
        resuming = any(output.resumed and exists(path) for output, path in files)
        places: dict[str, str] = {}
        for output, path in files:
            shown = f"--{output.flag}"
            check_output(shown, path, output.endings, overwrite=flag["overwrite"] or resuming or output.resumed)
            place = path if is_remote(path) else os.path.realpath(path)
            if place in places and (is_remote(path) or os.path.isfile(place) or not os.path.exists(place)):
                raise ValueError(f"{shown} must be a different file from {places[place]}. Received: {shown}={path}")
            places[place] = shown

    def outputs(self) -> list[Output]:
        """The flags for output files."""
        return [
            Output(name, known.endings, known.resumed, known.beside, known.beside_with)
            for name, known in self._known.items()
            if known.endings is not None
        ]

    def help(self) -> str:
        """The help text of all flags by group."""
        groups: dict[str, list[str]] = {}
        for name, known in self._known.items():
            if known.default == "no":
                head = f"--[no]{name}"
            else:
                head = f"--{name}" + (f"={known.default}" if known.default else "")
            conditions = "".join(f" Only {when.text}." for when in known.when)
            lines = textwrap.wrap(known.text + conditions, _WIDTH - 26)
            first = f"  {head:<23} " if len(head) <= 23 else f"  {head}\n{'':26}"
            groups.setdefault(known.group, []).append(first + f"\n{'':26}".join(lines))
        names = [name for name in groups if name != "General"] + ["General"]
        return "\n\n".join("\n".join([f"{name}:", *groups[name]]) for name in names)


def _files_of(output: Output, flag: Mapping[str, Any]) -> list[str]:
    """The files that a flag stands for."""
    path = flag[output.flag]
    if output.beside is None or (output.beside_with is not None and not flag[output.beside_with]):
        return [path]
    return [path, beside(path, output.beside)]


def _shown(name: str, value: Any) -> str:
    """Formats a flag as on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    return f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
