"""Doctests of docstrings as code blocks: `mkdocstrings` reads docstrings as Markdown, where `>>>`
is a quotation."""

import re

import griffe

_DOCTEST = re.compile(r"^([ ]*)>>> .*(?:\n(?!\s*$).*)*(?:\n\n\1>>> .*(?:\n(?!\s*$).*)*)*", re.M)


def fenced(text):
    """The text with each doctest in a fenced block.

    >>> fenced("Example:" + chr(10) * 2 + ">>> 1")
    'Example:\\n\\n```pycon\\n>>> 1\\n```'
    """

    def block(found):
        return f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"

    return _DOCTEST.sub(block, text)


class Doctests(griffe.Extension):
    """Changes every docstring before it is parsed."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
