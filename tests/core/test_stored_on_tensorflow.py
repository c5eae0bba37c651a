"""What TensorFlow keeps of an unrolled step: in a loop its state and the results of products, no
more, and nothing of a traced program that is gone. `jax_programs.py` has the first on JAX."""

import gc
import weakref

import pytest
import tensorflow as tf
from keras import ops

from keras_blur import backend
from keras_blur.core.connections.conv import ConvConnection
from keras_blur.core.derivatives import matmul, tanh

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("compiled", [backend.compiled, lambda function: backend.Runner().program(function, list)])
def test_a_traced_program_is_not_kept_in_memory(compiled):
    graphs = []

    def gradient(w):
        graphs.append(weakref.ref(tf.compat.v1.get_default_graph()))
        step = backend.recomputed(lambda w: ops.sum(tanh(matmul(w, w))), stores_costly=True)
        return backend.gradient(lambda w: (step(w), ()), w)[1]

    program = compiled(gradient)
    program(ops.ones((2, 2)))
    del program
    gc.collect()
    assert [graph() for graph in graphs] == [None]


def products_of_a_convolution(x, w):
    connection = ConvConnection(3, size=(1,), strides=(1,), padding="valid", dilation=(1,))
    kernel, entering = w[None, None, None], x[None, None, None]  # one member, channel or state, example
    sent = tanh(connection.linear(kernel, entering))
    back = connection.linear_transpose(kernel, sent, (3, 3))[0, 0, 0]
    return back + connection.outer(entering, sent, (3, 3))[0, 0, 0]


def test_a_loop_stores_its_state_and_products_only():
    def lists(options, convolves=False):
        """How many arrays each step of the loop adds to a list for the gradient."""

        def body(w, x):
            if convolves:
                return products_of_a_convolution(x, w), x
            return tanh(ops.sin(matmul(w, ops.exp(x)))) * ops.cos(matmul(x, tanh(w))), x

        body = body if options is None else backend.recomputed(body, **options)

        @tf.function(autograph=False)
        def program(w, x):
            with tf.GradientTape() as tape:
                tape.watch(w)
                loss = tf.reduce_sum(backend.loop(4, lambda _, *now: body(*now), w, x)[0])
            return tape.gradient(loss, w)

        graph = program.get_concrete_function(*(tf.TensorSpec((3, 3), tf.float64),) * 2).graph
        loops = [one for one in graph.get_operations() if one.type in ("While", "StatelessWhile")]
        return sum(output.dtype == tf.variant for output in loops[0].outputs)

    assert lists({"stores_costly": True}) == 4  # w, x and two products
    assert lists({"stores_costly": True}, convolves=True) == 5  # and the three products of a convolution
    assert lists({}) == 2
    assert lists(None) > 4
