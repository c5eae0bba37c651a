"""Members that are copies get initial networks of their own; all others share one network."""

import keras
import numpy as np
import pytest
from keras import ops
from marks import slow_but
from on_backend import JAX

from keras_blur import Genome, Rule, backend, learners, meta, random, tasks
from keras_blur.distribution import Shard
from keras_blur.meta import estimator as estimators

RULE = Rule(last_activation="linear", normalize_synapses="stored", batch_reduction="mean")
SINGLE = Genome.random(RULE, 3, std=0.5, synapse_update=-0.01)
ESTIMATORS = {
    "unroll": lambda: meta.Unroll(2),
    "truncated": lambda: meta.TruncatedUnroll(1, episode_steps=2),
    "warpgrad": lambda: meta.WarpGrad(2),
    "offline": lambda: meta.OfflineWarpGrad(2),
    "es": lambda: meta.ES(2, antithetic_pairs=2),
    "pes": lambda: meta.PES(1, episode_steps=2, antithetic_pairs=2),
}


def digits():
    return tasks.images("digits", classes=range(3), size=4)


def trainer(estimator=None, learner=None, members=3, **options):
    made = meta.MetaTrainer(
        digits(), learner or learners.Blur((4,), RULE), estimator or meta.Unroll(2), members=members, batch_size=8,
        query_size=8, **options,
    )  # fmt: skip
    made.compile(keras.optimizers.SGD(0.1), run_eagerly=not JAX)
    return made


def spread(made):
    """The largest distance of two neighbouring members, over the size of the parameters."""
    arrays = made.strategy.population().values()
    return max(np.abs(np.diff(one, axis=0)).max() for one in arrays) / max(np.abs(one).max() for one in arrays)


@pytest.mark.parametrize("name", slow_but(["unroll", "pes"], ESTIMATORS))
def test_copies_of_a_start_learn_apart(name):
    made = trainer(ESTIMATORS[name](), start=SINGLE)
    assert made.strategy.copies
    made.fit(1, 2, verbose=0)
    assert spread(made) > 1e-4


def test_the_first_copy_learns_as_a_single_member():
    made, alone = trainer(start=SINGLE), trainer(start=SINGLE, members=1)
    for one in (made, alone):
        one.fit(1, 2, verbose=0)
    for name, value in alone.strategy.population().items():
        np.testing.assert_allclose(made.strategy.population()[name][0], value[0], rtol=1e-4, atol=1e-6)


def test_copies_learn_apart_after_a_switch_of_the_curriculum():
    made = trainer()
    assert not made.strategy.copies
    made.fit(1, 1, verbose=0)
    made.synchronize()
    assert spread(made) == 0.0
    made.fit(1, 2, verbose=0)
    assert made.strategy.copies
    assert spread(made) > 1e-4


@pytest.mark.parametrize("epochs", slow_but([2], [1, 2]))
def test_a_resumed_run_keeps_the_networks(epochs, tmp_path):
    path, stages = tmp_path / "run.weights.h5", [(0, 1), (1, 2)]
    whole, before, after = trainer(), trainer(), trainer()
    whole.fit(3, 1, callbacks=[meta.UnrollCurriculum(stages)], verbose=0)
    before.fit(epochs, 1, checkpoint=path, callbacks=[meta.UnrollCurriculum(stages)], verbose=0)
    after.fit(3, 1, checkpoint=path, callbacks=[meta.UnrollCurriculum(stages)], verbose=0)
    for one, other in zip(whole.weights, after.weights, strict=True):
        np.testing.assert_array_equal(np.array(one.value), np.array(other.value))


def test_only_equal_members_are_copies():
    pair = Genome.random(RULE, 0, population=(2,))
    four = Genome.from_members(RULE, {n: v[[0, 1, 0, 0]] for n, v in pair.by_member().items()})
    made = trainer(start=four, members=4)
    assert np.array(made.strategy.networks.value).tolist() == [0, 0, 1, 2]


def episodes(count, features=4, outputs=3):
    sizes = {"x": (count, 1, 2, features), "y": (count, 1, 2, outputs), "query_x": (count, 2, features)}
    return {name: np.ones(shape, "float32") for name, shape in sizes.items()}


def dropping():
    model, warps = learners.warped(4, (3,), 3)
    model = keras.Sequential([keras.Input((4,)), model, keras.layers.Dropout(0.5)])
    return learners.Warp(model, warps, keras.optimizers.SGD(0.1))


LEARNERS = {
    "blur": lambda: learners.Blur((5,), RULE),
    "baseline": lambda: learners.BaselineLearner(keras.optimizers.SGD(0.1), (5,)),
    "maml": lambda: learners.MAML(keras.optimizers.SGD(0.1), (5,)),
    "prototypes": lambda: learners.Prototypes((5,)),
    "neural process": lambda: learners.NeuralProcess((3,)),
    "warp": dropping,
    "online": lambda: learners.OnlineRule(),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_number_gives_a_network_whatever_the_shard(name):
    learner, seed = LEARNERS[name](), random.seed_of(3)
    drawn = (learner if isinstance(learner, learners.MetaLearner) else learners.Blur((5,))).draw(0, 1, 4, 3)
    outer = {name: ops.convert_to_tensor(np.repeat(own, 3, axis=0)) for name, own in drawn.items()}
    shared = estimators.start(learner, outer, episodes(4), seed)
    apart = estimators.start(learner, outer, episodes(4), seed, Shard(networks=np.array([0, 1, 2], "int32")))
    two = {name: own[:2] for name, own in outer.items()}
    part = estimators.start(learner, two, episodes(2), seed, Shard(1, 2, networks=np.array([2, 0], "int32")))
    differs = []
    for leaves in zip(*map(backend.leaves, (shared, apart, part)), strict=True):
        one, all_of_them, some = map(ops.convert_to_numpy, leaves)
        if one.ndim < 2:
            np.testing.assert_array_equal(all_of_them, one)
            continue
        np.testing.assert_array_equal(all_of_them[0], one[0])
        np.testing.assert_array_equal(some, all_of_them[[2, 0]][:, 1::2])
        differs.append((all_of_them[1] != all_of_them[0]).any() and (all_of_them[2] != all_of_them[1]).any())
    assert any(differs) == (name in ("blur", "baseline", "warp"))  # the others draw nothing


def test_groups_of_copies_are_all_at_once(monkeypatch):
    learner, seed = learners.Blur((5,), RULE), random.seed_of(3)
    outer = {name: ops.convert_to_tensor(own.repeat(4, axis=0)) for name, own in learner.parameters(SINGLE).items()}
    data, shard = episodes(2) | {"query_y": np.ones((2, 2, 3), "float32")}, Shard(networks=np.arange(4, dtype="int32"))

    def compute(outer):
        return meta.Unroll(1).local_estimate(learner, outer, data, seed, estimators.NOTHING, True, shard)[0]

    at_once = backend.compiled(compute)(outer)
    monkeypatch.setattr(estimators, "_CACHED", 1)
    for one, other in zip(backend.leaves(backend.compiled(compute)(outer)), backend.leaves(at_once), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(one), ops.convert_to_numpy(other), rtol=1e-5, atol=1e-6)
    assert len(set(ops.convert_to_numpy(at_once.loss).tolist())) == 4
