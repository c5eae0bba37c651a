"""A sample of the fuzzer's cases: each ends in a clear error or a correct result; and the judge
tells the three apart."""

from collections import Counter

import fuzz_arguments
import fuzz_files
import pytest
from fuzz_case import Case, judge


@pytest.mark.parametrize(("source", "number"), [(fuzz_files.cases, 90), (fuzz_arguments.cases, 180)])
def test_every_case_ends_in_a_clear_error_or_a_correct_result(source, number):
    ends, wrong = Counter(), []
    for case in source(number, seed=12345):
        kind, said = judge(case)
        ends[kind] += 1
        if kind == "other":
            wrong.append((case.group, case.text, said))
    assert wrong == []
    assert ends["error"] > number // 3
    assert ends["correct"] > 0


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (lambda: None, "correct"),
        (lambda: fail(ValueError("`size` must be positive. Received: size=0")), "error"),
        (lambda: fail(OSError("no room for `size`")), "error"),
        (lambda: fail(ValueError("something is wrong")), "other"),
        (lambda: fail(ValueError("`size` is wrong\nand more")), "other"),
        (lambda: fail(ValueError("`size`" + 1000 * "x")), "other"),
        (lambda: fail(ValueError("")), "other"),
        (lambda: fail(KeyError("`size`")), "other"),
        (lambda: fail(AssertionError("`size`")), "other"),
    ],
)
def test_the_judge_tells_the_three_apart(run, kind):
    assert judge(Case("group", "text", run, ("`size`",)))[0] == kind
