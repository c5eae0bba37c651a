"""What an unrolled step stores for its gradient: the gradient is that of the plain function."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_blur import backend
from keras_blur.core.connections.conv import ConvConnection
from keras_blur.core.derivatives import by_operation, einsum, matmul, stored, tanh

pytestmark = pytest.mark.usefixtures("float64")


def arrays():
    rng = np.random.default_rng(0)
    return {"keep": rng.random((3, 3)), "x": rng.normal(size=(3, 3)), "w": 0.5 * rng.normal(size=(3, 3))}


def squared(keep, x, w):
    """One tensor twice in a product, and a product that is the first to read an argument."""
    product = matmul(w, x)
    return tanh(matmul(product, product)) + keep * w


def solved(keep, x, w):
    """Results that have no gradient beside those that have, and a factorisation."""
    positive = matmul(w, ops.transpose(w)) + ops.eye(3, dtype="float64")
    return keep * w + 0.1 * backend.solve_positive(positive, einsum("ij,jk->ik", x, w))


def differentiated(keep, x, w):
    """Products inside of a function whose transposed Jacobian is taken."""
    value, pull = backend.vjp(lambda x: stored(lambda a, b: tanh(ops.matmul(a, b)), x, w), x)
    return keep * w + 0.1 * matmul(pull(value)[0], w)


def looped(keep, x, w):
    """A loop inside of the step, whose products belong to another program."""
    return keep * w + backend.loop(2, lambda number, v: (tanh(matmul(v, x)),), w)[0]


def nested(keep, x, w):
    """A costly function with another one inside."""
    inside = stored(lambda a, b: tanh(matmul(a, b)) * a, x, w)
    return keep * w + 0.1 * matmul(inside, w)


def convolved(keep, x, w):
    """The three products of a convolution, of which two are transposes of the first."""
    connection = ConvConnection(3, size=(1,), strides=(1,), padding="valid", dilation=(1,))
    kernel, entering = w[None, None, None], x[None, None, None]  # one member, channel or state, example
    sent = connection.linear(kernel, entering)
    back = connection.linear_transpose(kernel, tanh(sent), (3, 3))
    return keep * w + 0.1 * (back[0, 0, 0] + connection.outer(entering, tanh(sent), (3, 3))[0, 0, 0])


STEPS = [squared, solved, differentiated, looped, nested, convolved]


def gradients(step, options, jit_compile, times=3):
    """The gradient of a loss of three steps in a loop, by `recomputed` with these options."""

    def body(outer, number, w):
        return (step(outer["keep"], outer["x"], w),)

    body = body if options is None else backend.recomputed(body, **options)

    def function(given):
        def loss(given):
            outer = {name: given[name] for name in ("keep", "x")}
            (w,) = backend.loop(times, lambda number, w: body(outer, number, w), given["w"])
            return ops.sum(w * w), ()

        return backend.gradient(loss, given)[1]

    found = backend.compiled(function, jit_compile=jit_compile)(backend.tree_map(ops.convert_to_tensor, arrays()))
    return {name: ops.convert_to_numpy(value) for name, value in found.items()}


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("options", [{"stores_costly": True}, {}], ids=["stored", "recomputed"])
@pytest.mark.parametrize("step", STEPS)
def test_the_gradient_is_that_of_the_plain_function(step, options, jit_compile):
    wanted = gradients(step, None, jit_compile)
    found = gradients(step, options, jit_compile)
    for name, value in wanted.items():
        assert np.abs(value).max() > 1e-3
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


def test_the_same_array_twice_has_the_sum_of_both_gradients():
    step = backend.recomputed(lambda a, b: ops.sum(matmul(a, a) * b), stores_costly=True)
    _, found = backend.gradient(lambda x: (step(x, x), ()), ops.convert_to_tensor([[2.0]]))
    assert float(found[0, 0]) == 12.0  # of x^3 at 2


def test_a_step_that_raises_leaves_nothing_behind():
    def raises(w):
        matmul(w, w)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        backend.recomputed(raises, stores_costly=True)(ops.eye(2))
    _, found = backend.gradient(lambda w: (ops.sum(matmul(w, w)), ()), ops.eye(2))
    np.testing.assert_array_equal(ops.convert_to_numpy(found), 2.0 * np.ones((2, 2)))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_program_of_xla_does_not_run_by_operation(jit_compile):
    """XLA compiles all programs of JAX."""
    found = []
    backend.compiled(lambda x: found.append(by_operation()) or x, jit_compile=jit_compile)(ops.ones(2))
    assert found == [keras.backend.backend() == "tensorflow" and not jit_compile]
