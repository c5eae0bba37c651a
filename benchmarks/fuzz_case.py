"""A case of `fuzz.py`, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

LONGEST = 600  # characters of an error that a person still reads
KINDS = ("error", "correct", "other")


class Case(NamedTuple):
    """One case.

    Attributes:
        group: kind of file, or name of the function.
        text: what is done, for a person.
        run: does it and returns a result; raises an `AssertionError` if that is wrong.
        names: strings; an error's message must contain at least one of them.
    """

    group: str
    text: str
    run: Callable[[], Any]
    names: tuple[str, ...]


def judge(case: Case) -> tuple[str, str]:
    """How a case ends, one of `KINDS`, and what was said."""
    try:
        case.run()
    except (ValueError, TypeError, OSError, ImportError) as error:
        said = str(error)
        clear = 0 < len(said) <= LONGEST and "\n" not in said.strip() and any(name in said for name in case.names)
        return ("error" if clear else "other"), f"{type(error).__name__}: {said}"
    except Exception as error:  # every other type is a finding, whatever it is
        return "other", f"{type(error).__name__}: {error}"
    return "correct", ""
