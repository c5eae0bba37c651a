"""Prose is at most 100 columns wide, in docstrings, comments and pages."""

import ast
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
    path
    for pattern in ("*.md", "*.py")
    for folder in (".", "keras_blur", "tests", "examples", "benchmarks", "tpu", "docs")
    for path in (ROOT / folder).glob(pattern if folder == "." else f"**/{pattern}")
    if path.parent != ROOT / "examples/paper/results"  # programs write those pages
)
WIDTH = 100


def in_python(text):
    """Lines of strings that stand alone, without doctests, and comments on lines of their own."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            doctest = False
            for line in lines[node.lineno - 1 : node.end_lineno]:
                doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
                if not doctest:
                    yield line
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            yield lines[token.start[0] - 1]


def in_markdown(text):
    """Lines without code, tables and pictures."""
    code = False
    for line in text.split("\n"):
        code ^= line.startswith("```")
        if not code and not line.startswith(("|", "![", "```", "    ")):
            yield line


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_at_most_100_columns_wide(path):
    lines = (in_python if path.suffix == ".py" else in_markdown)(path.read_text())
    assert [line for line in lines if len(line) > WIDTH] == []


def test_wide_prose_is_seen():
    wide = "a " * 60
    assert list(in_python(f'def f():\n    """{wide}"""\n    # {wide}\n')) == [
        f'    """{wide}"""',
        f"    # {wide}",
    ]
    assert list(in_python(f'"""One.\n\n>>> {wide}\n{wide}\n\nTwo."""\n')) == ['"""One.', "", "", 'Two."""']
    assert list(in_markdown(f"# One\n| {wide} |\n```sh\n{wide}\n```\n    {wide}\n{wide}")) == ["# One", wide]
