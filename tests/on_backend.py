"""Backend functions for tests that `keras.ops` lacks: compiled functions and gradients, on
TensorFlow and on JAX. Some need TensorFlow on both backends."""

import math
import re

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.datasets import load_digits

JAX = keras.backend.backend() == "jax"


def digits():
    """The 8x8 digits in the order and split of `tasks.datasets`, which needs TensorFlow: images and
    labels to train on, and to test on. `tests/tasks/test_datasets.py` holds them together."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))  # neighbouring digits have the same writer
    x, y = data.images.astype(np.uint8)[order][..., None], data.target[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def dataset(*arrays):
    """A `tf.data.Dataset` of batches of eight, which both backends accept."""
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(8)


def served(folder, inputs):
    """The predictions of a model that was exported to a folder, computed by TensorFlow."""
    model = pytest.importorskip("tensorflow").saved_model.load(str(folder))  # its functions do not keep it
    return model.serve(inputs)


if JAX:
    import jax
    from jax.interpreters.partial_eval import dce_jaxpr

    TAPES = [(jax, "grad"), (jax, "value_and_grad"), (jax, "vjp")]  # all by which a gradient is taken

    def in_a_graph(function, jit):
        """The function in a graph, compiled or not; on JAX there is no other graph than a compiled
        one."""
        return jax.jit(function) if jit else function

    def of_any_batch(function, shapes, dtype, jit):
        """The same for arrays `[k, batch, *features]` of shapes `[k, *features]` and any batch."""
        return in_a_graph(function, jit)

    def operations(function, *arguments):
        """Number of operations of a function's program, those in bodies of loops counted once."""
        return jax.jit(function).lower(*arguments).as_text().count("stablehlo.")

    def _machine_code(function, arguments):
        return jax.jit(function).lower(*arguments).compile().as_text()

    def slopes(function, points, cotangent=1.0):
        """Derivatives of the sum of cotangent times function, by each point."""
        return jax.grad(lambda points: ops.sum(ops.multiply(cotangent, function(*points))))(tuple(points))

    def soon(function):
        """The function as a few calls of it end soonest."""
        return jax.jit(function)

    @jax.custom_vjp
    def once(x):
        """A hyperbolic tangent whose gradient cannot be differentiated."""
        return jax.numpy.tanh(x)

    @jax.custom_vjp
    def _slope(y, upstream):
        return upstream * (1.0 - y * y)

    def _refuse(*_):
        raise RuntimeError("no second derivative")

    _slope.defvjp(lambda y, upstream: (_slope(y, upstream), None), _refuse)
    once.defvjp(lambda x: (once(x), once(x)), lambda y, upstream: (_slope(y, upstream),))

    def products_of_branches(function, *arguments):
        """Matrix products that each branch of each conditional in a program computes."""
        program = jax.make_jaxpr(function)(*arguments)

        def products(branch):
            kept = dce_jaxpr(branch.jaxpr, [True] * len(branch.out_avals))[0]  # what the results come from
            return sum(equation.primitive.name == "dot_general" for equation in kept.eqns)

        cases = [equation.params["branches"] for equation in program.eqns if equation.primitive.name == "cond"]
        return [[products(branch) for branch in branches] for branches in cases]

else:
    import tensorflow as tf

    from keras_blur import compiling

    TAPES = [(tf, "GradientTape")]  # all by which a gradient is taken

    def in_a_graph(function, jit):
        """The function in a graph, compiled or not; on JAX there is no other graph than a compiled
        one."""
        return tf.function(function, jit_compile=jit, autograph=False)

    def of_any_batch(function, shapes, dtype, jit):
        """The same for arrays `[k, batch, *features]` of shapes `[k, *features]` and any batch."""
        specs = [tf.TensorSpec((shape[0], None, *shape[1:]), dtype) for shape in shapes]
        return tf.function(function, input_signature=specs, jit_compile=jit, autograph=False)

    def operations(function, *arguments):
        """Number of operations of a function's program, those in bodies of loops counted once."""
        return compiling.operations(in_a_graph(function, False).get_concrete_function(*arguments)).total()

    def _machine_code(function, arguments):
        return compiled(function).experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")

    def slopes(function, points, cotangent=1.0):
        """Derivatives of the sum of cotangent times function, by each point."""
        points = tuple(points)
        with tf.GradientTape() as tape:
            tape.watch(points)
            value = ops.sum(ops.multiply(cotangent, function(*points)))
        return tape.gradient(value, points, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    def soon(function):
        """The function as a few calls of it end soonest."""
        return function

    @tf.custom_gradient
    def once(x):
        """A hyperbolic tangent whose gradient cannot be differentiated."""
        y = tf.tanh(x)

        @tf.custom_gradient
        def backward(upstream):
            def refuse(*_):
                raise RuntimeError("no second derivative")

            return upstream * (1.0 - y * y), refuse

        return y, lambda upstream: backward(upstream)

    def products_of_branches(function, *arguments):
        """Matrix products that each branch of each conditional in a program computes."""
        traced = tf.function(function, autograph=False).get_concrete_function(*arguments)
        graph = traced.graph.as_graph_def()
        library = {one.signature.name: one for one in graph.library.function}

        def products(branch):
            """Of those operations that the results come from: others are not executed."""
            nodes = {node.name: node for node in branch.node_def}
            reached, ahead = set(), [value.split(":")[0] for value in [*branch.ret.values(), *branch.control_ret.values()]]
            while ahead:
                name = ahead.pop()
                if name in nodes and name not in reached:
                    reached.add(name)
                    ahead += [value.split(":")[0].lstrip("^") for value in nodes[name].input]
            return sum(nodes[name].op == "MatMul" for name in reached)

        cases = [[library[one.name] for one in node.attr["branches"].list.func] for node in graph.node if "Case" in node.op]
        return [[products(branch) for branch in branches] for branches in cases]


def compiled(function):
    """The function under XLA."""
    return in_a_graph(function, True)


def bytes_of_loops(function, *arguments):
    """Bytes of float32 numbers that the outermost loops of a function's compiled program carry."""
    text = _machine_code(function, arguments)
    loops = [line.split(" while(")[0] for line in text[text.index("\nENTRY") :].splitlines() if " while(" in line]
    assert loops
    shapes = re.findall(r"f32\[([\d,]*)\]", "".join(loops))
    return 4 * sum(math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)
