"""Programs compile whole, from shapes alone, to the uncompiled numbers; and the check that says so
refuses what does not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from compiled import FLAT, ROWS, Program, check, compile_seconds
from marks import slow_but

from keras_blur import backend
from keras_blur.tasks import episodes, functions, images

QUICK = (
    "network.step, default", "train_step, structural layers", "test_step, orthogonal", "meta-step, warpgrad, start leap",
    "bilevel step, sampler",
)  # fmt: skip


@pytest.mark.parametrize("name", slow_but(QUICK, ROWS))
def test_a_program_compiles_to_the_uncompiled_numbers(name):
    row = check(ROWS[name]())
    assert row["failures"] == []
    assert row["traces"] == 1
    assert row["difference"] <= row["tolerance"]
    keras.backend.clear_session()


@pytest.mark.slow
def test_compile_time_does_not_grow_with_the_unroll():
    assert np.median([compile_seconds(50) / compile_seconds(5) for _ in range(3)]) <= FLAT


@pytest.mark.usefixtures("eagerly")
def test_where_tensorflow_is_told_so_functions_run_eagerly():
    assert backend.compiled(lambda x: x * float(x))(tf.constant(3.0)) == 9.0


@pytest.mark.parametrize("by_xla", [True, False])
def test_xla_factorises_small_blocks_alone(monkeypatch, by_xla):
    sizes, whole = [], tf.linalg.cholesky

    def cholesky(matrix):
        sizes.append(matrix.shape[-1])
        return whole(matrix)

    monkeypatch.setattr(tf.linalg, "cholesky", cholesky)
    backend.compiled(backend.solve_positive, jit_compile=by_xla)(tf.eye(37), tf.ones((37, 1)))
    assert sum(sizes) == 37
    assert (max(sizes) <= 16) == by_xla


X = [(tf.constant([1.0, -2.0, 3.0]),), (tf.constant([-1.0, 2.0, 5.0]),)]


def python(x):
    return tf.ensure_shape(tf.py_function(lambda x: 2 * x, [x], x.dtype), x.shape)


class Forgetful:
    """Does something else each time it is traced."""

    def __init__(self):
        self.traced = 0

    def __call__(self, x):
        self.traced += 1
        return self.traced * x


class Outer:
    """Two outer parameters, the lesser of which moves by other random numbers when compiled."""

    def __init__(self, size):
        self.size = size
        self.kernel = tf.Variable(tf.ones(3), name="trainer/outer_kernel")
        self.bias = tf.Variable(tf.zeros(3), name="trainer/outer_bias")

    def __call__(self, x):
        self.bias.assign(self.size * tf.random.stateless_uniform([3], [1, 2]))
        return x * self.kernel


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (Program(lambda x: 2 * x, X), None),
        (Program(python, X), "no TPU kernel for EagerPyFunc"),
        (Program(lambda x: tf.boolean_mask(x, x > 0), X), "shapes are not static"),
        (Program(Forgetful(), [X[0], (tf.constant([1.0]),)]), "2 traces"),
        (Program(lambda x: x + tf.random.stateless_uniform([3], [1, 2]), X), "compiled differs"),
        (Program(Outer(1e-2), X), "compiled differs"),
        (Program(Outer(1e-9), X), None),
        (Program(lambda x, n: tf.zeros(n), [(*X[0], tf.constant(3))]), "must be a compile-time constant"),
        (Program(lambda x: x, [(3.0,)]), "an argument is no tensor"),
    ],
    ids=[
        "correct",
        "python",
        "dynamic",
        "retraced",
        "other random numbers",
        "another outer parameter",
        "rounding of one",
        "a size from a value",
        "no tensor",
    ],
)
def test_the_check_sees_what_is_wrong(program, said):
    failures = "; ".join(check(program)["failures"])
    if said is None:
        assert failures == ""
    else:
        assert said in failures


PIPELINES = {
    "images": images("digits", size=4),
    "cropped": images("digits", crop=4),
    "every option": images("digits", size=6, relabel=True, permute=True, project=9),
    "functions": functions(["xor", "circle", "cross"], noise=0.1, relabel=True),
    "sine": functions("sine"),
    "few-shot": episodes("digits", ways=3, shots=2),
}


def python_in(stream):
    """Operations of a pipeline that call Python."""
    graph = stream._as_serialized_graph(external_state_policy=tf.data.experimental.ExternalStatePolicy.IGNORE)
    document = tf.compat.v1.GraphDef.FromString(graph.numpy())
    nodes = {node.op for node in document.node} | {n.op for f in document.library.function for n in f.node_def}
    return {op for op in nodes if "PyFunc" in op or op.startswith("Generator")}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_task_stream_has_no_python_in_it(name):
    assert not python_in(PIPELINES[name].dataset(0, steps=2, batch=4, query=4).batch(2))


def test_no_stream_has_a_thread_that_tunes_it():
    """The thread sleeps for up to a minute, and whoever deletes an iterator may wait for it."""
    episodes = PIPELINES["functions"].dataset(0, steps=2, batch=4, query=4).batch(2)
    batches = backend.passes([np.zeros((4, 2))], lambda number: tf.constant([[0, 1], [2, 3]]), 0, 0)

    class Passes:  # what stands for a `PyDataset`
        element_spec = (tf.TensorSpec((4, 2)),)

    for stream in (episodes, batches, backend.repeated(Passes(), 0, 0, 1)):
        assert stream.options().autotune.enabled is False
    own = tf.data.Dataset.from_tensors((np.zeros((4, 2)),))  # a user's dataset stays as it is
    assert backend.repeated(own, 0, 0, 1).options().autotune.enabled is None


def test_python_in_a_stream_is_seen():
    numbers = tf.data.Dataset.from_generator(lambda: iter([1.0]), output_signature=tf.TensorSpec(()))
    assert python_in(numbers.batch(2))
