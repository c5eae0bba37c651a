"""Learning with a genome of which meta-training changes some arrays only."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_blur import Genome, Rule, backend, genomes, learners, meta, random, tasks

GATE = ("synapse_update", "decay_power")


def without(genome, names=GATE):
    return {name: value for name, value in genome.arrays.items() if name not in names}


@pytest.fixture
def fast():
    return genomes.load("fast")


@pytest.mark.parametrize("layers", [None, 2])
def test_what_is_fixed_counts_as_what_is_learned(layers):
    rule = Rule(batch_reduction="mean", update_decay="power", layers=layers)
    genome = Genome.random(rule, 0, std=0.3, synapse_update=-0.1)
    some = learners.Blur((6,), rule, fixed=without(genome))
    every = learners.Blur((6,), rule)
    tasks_of = tasks.images("digits", size=4, relabel=True)
    drawn = [tasks_of.episode(random.seed_of(one), steps=3, batch=8, query=16) for one in range(2)]
    episodes = {name: ops.stack([one[name] for one in drawn]) for name in drawn[0]}
    estimator = meta.Unroll(3, trajectory_loss_weight=0.5)

    def estimate(learner):
        outer = backend.tree_map(ops.convert_to_tensor, {n: np.float32(v) for n, v in learner.parameters(genome).items()})
        return estimator(learner, outer, episodes, random.seed_of(1))[0]

    part, whole = estimate(some), estimate(every)
    assert sorted(part.gradients) == sorted(GATE)
    assert float(part.loss[0]) == pytest.approx(float(whole.loss[0]), rel=1e-5)
    for name in GATE:
        found, expected = (ops.convert_to_numpy(one.gradients[name]) for one in (part, whole))
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("estimator", [meta.Unroll(3), meta.Evolution(3, population=4)])
def test_only_the_others_are_meta_trained(fast, estimator, tmp_path):
    learner = learners.Blur((8,), fast.rule, fixed=without(fast))
    trainer = meta.MetaTrainer(
        tasks.images("digits", size=4), learner, estimator, batch_size=8, query_size=16, start=fast, members=1
    )
    trainer.compile(None if isinstance(estimator, meta.Evolution) else keras.optimizers.SGD(0.1), jit_compile=False)
    path = str(tmp_path / "learned.json")
    trainer.fit(1, 2, callbacks=[meta.SaveLearned(path)], verbose=0)
    learned = Genome.load(path)
    for name, value in fast.arrays.items():
        assert np.array_equal(learned.arrays[name], value) == (name not in GATE), name


def test_random_starts_keep_what_is_fixed(fast):
    learner = learners.Blur((8,), fast.rule, fixed=without(fast))
    drawn = learner.draw(0, 3, 4, 2)
    assert {name: value.shape for name, value in drawn.items()} == dict.fromkeys(GATE, (3,))
    learned = learner.learned({name: value[1] for name, value in drawn.items()})
    np.testing.assert_array_equal(learned.nu, fast.nu)
    assert not learner.shares_outer(learners.Blur((8,), fast.rule))
    assert learner.shares_outer(learners.Blur((9,), fast.rule, fixed=without(fast)))


@pytest.mark.parametrize("layers", [None, 2])
def test_a_population_has_what_is_fixed_in_each_member(layers):
    rule = Rule(batch_reduction="mean", update_decay="power", layers=layers)
    fixed = without(Genome.random(rule, 0, std=0.3))
    learner = learners.Blur((6,), rule, fixed=fixed)
    trainer = meta.MetaTrainer(tasks.functions("xor"), learner, meta.Unroll(2), members=3)
    found = trainer.population
    assert found.population == (3,)
    for member in range(3):
        wanted = learner.learned(trainer.parameters(member))
        assert found.member(member) == wanted
        for name, value in fixed.items():
            np.testing.assert_array_equal(found.member(member).arrays[name], value)
    for name, value in learner.parameters(found).items():
        np.testing.assert_array_equal(value, trainer.strategy.population()[name])


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (("nu",), "`fixed` must be a mapping from names to arrays, or None"),
        ({"nu_": np.eye(2)}, "`fixed` must have names of nu, .* Received: nu_"),
        ({"nu": np.eye(3)}, r"`fixed\['nu'\]` must have shape \(2, 2\). Received shape \(3, 3\)"),
        ({"decay_power": np.float32(np.nan)}, "decay_power"),
    ],
)
def test_errors(fast, fixed, message):
    with pytest.raises(ValueError, match=message):
        learners.Blur((8,), fast.rule, fixed=fixed)


def test_nothing_left_to_learn_and_another_start(fast):
    with pytest.raises(ValueError, match="must leave some arrays"):
        learners.Blur((8,), fast.rule, fixed=fast.arrays)
    learner = learners.Blur((8,), fast.rule, fixed=without(fast))
    with pytest.raises(ValueError, match="`start` must have the `nu` that the learner's `fixed` has"):
        learner.parameters(fast.replace(nu=2.0 * fast.nu))
