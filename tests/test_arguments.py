"""Checks of plain arguments: one sentence each, and no valid value is refused."""

import numpy as np
import pytest

from keras_blur import arguments

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("check", "valid", "wrong"),
    [
        (lambda v: arguments.choice("name", v, ("a", "b")), ["a", "b"], ["c", "", None, 3, ["a"], np.array(["a"])]),
        (lambda v: arguments.integer("name", v, 0), [0, 3, np.int64(2)], [-1, True, 1.0, "1", None, NAN, [1]]),
        (lambda v: arguments.count("name", v), [1, np.uint8(4)], [0, False, 2.0, (), None]),
        (lambda v: arguments.counts("name", v), [(), [3], (2, np.int32(1)), np.array([5])], [3, "3", (0,), (2.5,), None]),
        (lambda v: arguments.real("name", v, low=0.0, high=1.0), [0, 1, np.float32(0.25)], [-0.1, 1.1, True, NAN, "0"]),
        (lambda v: arguments.real("name", v), [-5, 1e30], [INFINITY, -INFINITY, NAN, ()]),
        (lambda v: arguments.positive("name", v), [1e-9, 3, np.float64(2)], [0, -1.0, INFINITY, NAN, "1", None, True]),
        (lambda v: arguments.between("name", v, 0.0, 1.0), [0.5, 1e-6], [0, 1, 1.0, None, "x", [0.5]]),
        (lambda v: arguments.flag("name", v), [True, False, np.True_], [0, 1, None, "yes"]),
        (lambda v: arguments.instance("name", v, str, "a string"), ["", "x"], [3, None, b"x"]),
    ],
)  # fmt: skip
def test_valid_values_pass_and_others_are_one_sentence(check, valid, wrong):
    for value in valid:
        check(value)
    for value in wrong:
        with pytest.raises(ValueError, match=r"^`name` must be [^\n]*\. Received: name=[^\n]*$"):
            check(value)


def test_counts_are_python_integers():
    assert [type(one) for one in arguments.counts("hidden", np.array([3, 4]))] == [int, int]


def test_what_came_is_cut_to_one_short_line():
    said = arguments.received("x", np.zeros((50, 50)))
    assert "\n" not in said
    assert len(said) < 230
