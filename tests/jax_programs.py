"""What `tests/test_jax.py` runs in a process of its own, under KERAS_BACKEND=jax or tensorflow.

python tests/jax_programs.py PROGRAM[,PROGRAM...] FOLDER
"""

import os
import sys

import keras
import numpy as np

import keras_blur as kb
from keras_blur import backend, layers

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(64, 8, 8, 2)).astype("float32"), rng.integers(0, 3, 64)


def network(genome):
    """A small residual net with normalisation."""
    x = keras.Input((8, 8, 2))
    h = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    r = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(h))
    h = keras.layers.Activation("relu")(keras.layers.Add()([h, r]))
    h = keras.layers.MaxPooling2D(2)(h)
    return kb.Model(x, layers.Dense(3)(keras.layers.Flatten()(h)), genome=genome)


def genomes():
    rule = kb.Rule(states=3, normalize_activations="both", momentum="before", batch_reduction="mean")
    whitened = kb.genomes.backprop(0.1)
    whitened = whitened.with_rule(
        whitened.rule.replace(whitening=True, normalize_term="frobenius", momentum="after", slow_synapses=True)
    )
    random = kb.Genome.random(rule, seed=1, std=0.3, synapse_update=-1e-3)
    signs = kb.genomes.backprop(0.01)
    signs = signs.with_rule(signs.rule.replace(directions="signs"))
    return {"backprop": kb.genomes.backprop(0.01), "signs": signs, "random": random, "whitened": whitened}


def drawn_bits():
    """Random integers of several seeds, some of them negative."""
    seeds = [(0, 0), (0, 5), (-3, 7), (12345, -9)]
    return np.stack([np.asarray(backend.bits(keras.ops.array(seed, "int32"), (3, 5))) for seed in seeds])


def make(folder):
    """Models of three genomes in files, before and after ten steps, with predictions."""
    x, y = data()
    np.save(os.path.join(folder, "bits.npy"), drawn_bits())
    for name, genome in genomes().items():
        keras.utils.set_random_seed(3)
        model = network(genome)
        model.compile(loss=LOSS, metrics=["accuracy"])
        model.save(os.path.join(folder, f"{name}_start.keras"))
        np.save(os.path.join(folder, f"{name}_start.npy"), model.predict(x, verbose=0))
        losses = model.fit(x, y, batch_size=32, epochs=5, shuffle=False, verbose=0).history["loss"]
        model.save(os.path.join(folder, f"{name}_end.keras"))
        np.save(os.path.join(folder, f"{name}_end.npy"), model.predict(x, verbose=0))
        np.save(os.path.join(folder, f"{name}_losses.npy"), losses)


def check(folder):
    """Loads what the other backend made: the same predictions, and after ten steps too."""
    x, y = data()
    np.testing.assert_array_equal(drawn_bits(), np.load(os.path.join(folder, "bits.npy")))
    for name in genomes():
        for when in ("start", "end"):
            model = keras.models.load_model(os.path.join(folder, f"{name}_{when}.keras"))
            wanted = np.load(os.path.join(folder, f"{name}_{when}.npy"))
            np.testing.assert_allclose(model.predict(x, verbose=0), wanted, rtol=1e-5, atol=1e-5)
        model = keras.models.load_model(os.path.join(folder, f"{name}_start.keras"))
        history = model.fit(x, y, batch_size=32, epochs=5, shuffle=False, verbose=0).history
        np.testing.assert_allclose(history["loss"], np.load(os.path.join(folder, f"{name}_losses.npy")), rtol=1e-5)
        wanted = np.load(os.path.join(folder, f"{name}_end.npy"))
        np.testing.assert_allclose(model.predict(x, verbose=0), wanted, rtol=1e-4, atol=1e-5)


def features(folder):
    """What people do with a model on JAX: callbacks, weights, generators, a dropout, errors in one
    sentence."""
    x, y = data()
    model = network(kb.genomes.backprop(0.02))
    model.compile(loss=LOSS, metrics=["accuracy"], weighted_metrics=["accuracy"])
    stop = keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True)
    best = keras.callbacks.ModelCheckpoint(os.path.join(folder, "best.keras"), save_best_only=True)
    history = model.fit(
        x, y, epochs=4, verbose=0, sample_weight=np.linspace(0.5, 1.5, 64), validation_split=0.25, callbacks=[stop, best]
    )
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert os.path.exists(os.path.join(folder, "best.keras"))
    wrong = x.copy()
    wrong[3] = np.nan
    try:
        model.fit(wrong, y, verbose=0)
    except ValueError as error:
        assert str(error).startswith("`x` must be finite.")  # noqa: PT017
    else:
        raise AssertionError("NaN passed")

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return x[32 * index : 32 * index + 32], y[32 * index : 32 * index + 32]

    model.fit(Batches(), epochs=1, verbose=0)
    model.train_on_batch(x[:8], y[:8])
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) >= {"loss", "accuracy"}
    dropped = kb.Sequential(
        [keras.Input((8, 8, 2)), keras.layers.Flatten(), layers.Dense(9), keras.layers.Dropout(0.5), layers.Dense(3)],
        genome=kb.Genome.random(kb.Rule(), 0),
    )
    dropped.compile(loss=LOSS)
    dropped.fit(x, y, verbose=0)


def parallel(folder):
    """Four devices do the ten steps that one device did in `make`."""
    x, y = data()
    devices = keras.distribution.list_devices()
    assert len(devices) == 4
    for name in genomes():
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
        four = keras.models.load_model(os.path.join(folder, f"{name}_start.keras"))
        losses = four.fit(x, y, batch_size=32, epochs=5, shuffle=False, verbose=0).history["loss"]
        keras.distribution.set_distribution(None)
        one = keras.models.load_model(os.path.join(folder, f"{name}_end.keras"))
        np.testing.assert_allclose(losses, np.load(os.path.join(folder, f"{name}_losses.npy")), rtol=1e-6)
        atol = 1e-5 if name == "whitened" else 1e-6  # a solved system enlarges the rounding of its sums
        for found, wanted in zip(four.weights, one.weights, strict=True):
            found, wanted = map(keras.ops.convert_to_numpy, (found, wanted))
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)


def philox(folder):
    """The generator's published numbers ("Parallel random numbers: as easy as 1, 2, 3", known
    answers of philox4x32-10)."""
    from keras_blur.backend.with_jax import numbers

    del folder
    word = np.uint32
    cases = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ]
    for counter, key, wanted in cases:
        found = numbers.philox([word(one) for one in counter], [word(one) for one in key])
        assert [int(one) for one in found] == wanted


def systems(folder):
    """On a CPU, LAPACK gets one system at a time: with several, programs can wait forever. The
    numbers are those of numpy."""
    import jax

    from keras_blur.backend import solve_positive

    rng = np.random.default_rng(0)
    roots, right = rng.normal(size=(2, 3, 8, 8)), rng.normal(size=(3, 8, 2))
    matrices = roots @ roots.swapaxes(-1, -2) + np.eye(8)

    def squares(matrices, right):
        return keras.ops.sum(solve_positive(matrices, right) ** 2)

    for function in (solve_positive, jax.grad(squares, argnums=(0, 1))):
        compiled = jax.jit(function).lower(matrices, right).compile()
        calls = [line.split("custom-call")[0] for line in compiled.as_text().splitlines() if '_target="lapack_' in line]
        assert len(calls) >= 3
        assert not [call for call in calls if "[6," in call or "[2,3," in call or "[3," in call]
    np.testing.assert_allclose(solve_positive(matrices, right), np.linalg.solve(matrices, right), rtol=1e-4, atol=1e-5)
    slope = jax.grad(squares)(matrices, right)
    solved = np.linalg.solve(matrices, right)
    wanted = -2 * np.linalg.solve(matrices, solved) @ solved.swapaxes(-1, -2)
    symmetric = [(one + one.swapaxes(-1, -2)) / 2 for one in (np.asarray(slope), wanted)]
    np.testing.assert_allclose(*symmetric, rtol=1e-3, atol=1e-4)


def stored(folder):
    """For its gradient a loop stores what it carries and the results of products, no more; with
    recomputation what it carries at the start of a segment."""
    import jax

    from keras_blur import learners, meta, random

    features, units, classes, batch = 60, 40, 5, 8
    genome = kb.Genome.random(kb.Rule(), 0)
    learner = learners.Blur((units,), genome.rule).on((features,), classes)
    outer = learner.parameters(genome)

    def memory(steps, **options):
        episodes = {
            "x": np.ones((1, steps, batch, features), "float32"), "y": np.ones((1, steps, batch, classes), "float32"),
            "query_x": np.ones((1, batch, features), "float32"), "query_y": np.ones((1, batch, classes), "float32"),
        }  # fmt: skip
        estimator = meta.Unroll(steps, **options)
        program = jax.jit(lambda outer, episodes: estimator(learner, outer, episodes, random.seed_of(0))[0])
        return program.lower(outer, episodes).compile().memory_analysis().temp_size_in_bytes

    kernels = 2 * (features * units + 2 * units * classes)  # two states; the second layer has a backward kernel
    neurons = 2 * batch * (4 * units + 4 * classes)
    assert (memory(64) - memory(32)) / 32 < 4 * 1.25 * (kernels + neurons)
    assert memory(64, recompute=True) < 0.5 * memory(64)


def mixing(folder):
    """Mixed states have the derivatives of the product that they are, to second order, forward and
    reverse; states of one member may meet the transforms of several."""
    import jax
    import jax.numpy as jnp

    del folder
    rng = np.random.default_rng(0)
    transform, change = rng.normal(size=(2, 4, 1, 3, 2)).astype("float32")
    states, moved = rng.normal(size=(2, 1, 1, 3, 5, 7)).astype("float32")

    def product(states, transform):
        return jnp.einsum("...sbu,...st->...tbu", states, transform, precision="highest")

    def curvature(mix):  # the gradient of the size of a gradient
        def size(*arrays):
            slopes = jax.grad(lambda *arrays: jnp.sum(jnp.tanh(mix(*arrays)) ** 2), (0, 1))(*arrays)
            return sum(jnp.sum(slope**2) for slope in slopes)

        return jax.grad(size, (0, 1))(states, transform)

    for question in (
        lambda mix: mix(states, transform),
        lambda mix: jax.jvp(mix, (states, transform), (moved, change)),
        lambda mix: jax.vjp(mix, states, transform)[1](jnp.ones((4, 1, 2, 5, 7))),
        curvature,
    ):
        found, wanted = (jax.tree.leaves(jax.jit(question, static_argnums=0)(mix)) for mix in (backend.mixed, product))
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def core(folder):
    """A genome is a tree of arrays that jit, grad and vmap take as it is."""
    import jax
    import jax.numpy as jnp

    del folder
    genome = kb.Genome.random(kb.Rule(states=3), seed=0)

    def size(value):
        return sum(jnp.sum(jnp.square(array)) for array in value.arrays.values())

    slope = jax.jit(jax.grad(size))(genome)
    assert isinstance(slope, kb.Genome)
    np.testing.assert_allclose(slope.nu, 2 * genome.nu, rtol=1e-6)
    population = kb.Genome.random(kb.Rule(states=3), seed=0, population=(4,))
    assert jax.vmap(size)(population).shape == (4,)


def hypergradients():
    """The first outer gradient of each estimator, and what a training makes of it: weights,
    learned weights of examples and the numbers that were logged."""
    from bilevel_table import ESTIMATORS

    x, y = data()
    found = {}
    for name, estimator in ESTIMATORS.items():
        first, second = keras.layers.Dense(6, use_bias=False), keras.layers.Dense(3)  # the normalisation has a bias
        middle = [keras.layers.BatchNormalization(), keras.layers.Activation("tanh")]
        model = keras.Sequential([keras.Input((8, 8, 2)), keras.layers.Flatten(), first, *middle, second])
        net, rng = kb.bilevel.SampleWeightNet(5), np.random.default_rng(1)
        for variable in (first.kernel, second.kernel, net.first.kernel, net.second.kernel):
            variable.assign(rng.standard_normal(variable.shape) / variable.shape[0] ** 0.5)
        trainer = kb.bilevel.BilevelTrainer(model, net, estimator)
        trainer.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.SGD(1.0), LOSS, ["accuracy"])
        before = [keras.ops.convert_to_numpy(one) for one in net.weights]
        options = {"meta_data": (x[:32], y[:32]), "batch_size": 16, "verbose": 0}
        trainer.fit(x, y, steps_per_epoch=1, **options)
        for place, (old, variable) in enumerate(zip(before, net.weights, strict=True)):
            found[f"{name}, gradient {place}"] = old - keras.ops.convert_to_numpy(variable)
        logs = trainer.fit(x, y, epochs=2, **options).history
        found |= {f"{name}, {key}": np.array(value) for key, value in logs.items()}
        for place, variable in enumerate([*model.weights, *net.weights]):
            found[f"{name}, weight {place}"] = keras.ops.convert_to_numpy(variable)
    return found


def make_hypergradients(folder):
    np.savez(os.path.join(folder, "hypergradients.npz"), **hypergradients())


def check_hypergradients(folder):
    """The same numbers as on the backend that made them."""
    wanted = np.load(os.path.join(folder, "hypergradients.npz"))
    found = hypergradients()
    assert set(found) == set(wanted)
    for name, value in found.items():
        rtol = 1e-5 if "gradient" in name else 1e-4
        # A gradient is the difference of two weights, which are rounded to 1e-7.
        atol = max(rtol * np.abs(wanted[name]).max(), 2e-7)
        np.testing.assert_allclose(value, wanted[name], rtol=rtol, atol=atol, err_msg=name)


if __name__ == "__main__":
    for program in sys.argv[1].split(","):
        keras.utils.set_random_seed(0)
        globals()[program](sys.argv[2])
