"""Members in groups: the values of all at once, groups of equal size, no more members at a time."""

import numpy as np
import pytest
from keras import ops

from keras_blur import Genome, Rule, backend, meta, random
from keras_blur.learners import Blur
from keras_blur.meta import estimator as estimators

STEPS, BATCH, FEATURES, CLASSES = 3, 8, 5, 3
RULE = Rule(batch_reduction="mean")


def case(members):
    """A learner, different outer parameters and the episodes of two tasks."""
    rng = np.random.default_rng(0)

    def labels(*shape):
        return (2.0 * np.eye(CLASSES)[rng.integers(0, CLASSES, shape)] - 1.0).astype("float32")

    episodes = {
        "x": rng.standard_normal((2, STEPS, BATCH, FEATURES), "float32"),
        "y": labels(2, STEPS, BATCH),
        "query_x": rng.standard_normal((2, 16, FEATURES), "float32"),
        "query_y": labels(2, 16),
    }
    learner = Blur((7,), RULE).on((FEATURES,), CLASSES)
    drawn = [learner.parameters(Genome.random(RULE, seed, std=0.2)) for seed in range(members)]
    outer = {name: np.concatenate([one[name][:1] for one in drawn]).astype("float32") for name in drawn[0]}
    return learner, *backend.tree_map(ops.convert_to_tensor, (outer, episodes)), random.seed_of(3)


def size_of_one(learner, outer, episodes, seed):
    state = estimators.start(learner, {name: value[:1] for name, value in outer.items()}, episodes, seed)
    return sum(int(np.prod(leaf.shape)) for leaf in backend.leaves(state))


def of_unroll(learner, outer, episodes, seed):
    return meta.Unroll(STEPS, trajectory_loss_weight=0.5)(learner, outer, episodes, seed)[0]


def of_es(learner, outer, episodes, seed):
    return meta.ES(STEPS, antithetic_pairs=2)(learner, outer, episodes, seed)[0]


def of_evolution(learner, outer, episodes, seed):
    return meta.Evolution(STEPS, population=6, fitness="speed").score(learner, outer, episodes, seed)


@pytest.mark.parametrize(("values", "jit_compile"), [(of_unroll, True), (of_es, False), (of_evolution, True)])
def test_groups_give_the_values_of_all_at_once(values, jit_compile, monkeypatch):
    learner, outer, episodes, seed = case(6)

    def compute():
        run = backend.compiled(lambda outer, episodes: values(learner, outer, episodes, seed), jit_compile=jit_compile)
        return [ops.convert_to_numpy(leaf) for leaf in backend.leaves(run(outer, episodes))]

    at_once = compute()
    groups, one_by_one = [], backend.one_by_one

    def noting(function, arrays, like):
        groups.append(backend.leaves(arrays)[0].shape[:2])
        return one_by_one(function, arrays, like)

    monkeypatch.setattr(backend, "one_by_one", noting)
    monkeypatch.setattr(estimators, "_CACHED", 2 * size_of_one(learner, outer, episodes, seed))
    for one, other in zip(compute(), at_once, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert {size for _, size in groups} == {2}
    assert len({tuple(leaf) for leaf in at_once[-1].reshape(len(at_once[-1]), -1).tolist()}) > 1  # members differ


@pytest.mark.parametrize(("members", "fit", "expected"), [(6, 2, 2), (6, 5, 3), (7, 3, 1), (6, 0, 1), (6, 6, 6)])
def test_a_group_is_the_largest_part_that_fits(members, fit, expected, monkeypatch):
    learner, outer, episodes, seed = case(members)
    monkeypatch.setattr(estimators, "_CACHED", fit * size_of_one(learner, outer, episodes, seed))
    monkeypatch.setattr(backend, "on_platform", lambda arrays, *, cpu, other: cpu(arrays))
    seen = set()

    def doubled(outer, shard):
        value = outer[min(outer)]
        seen.add(value.shape[0])
        return 2.0 * value

    def like(count, dtype):
        value = outer[min(outer)]
        return np.zeros((count, *value.shape[1:]), dtype)

    found = backend.compiled(lambda outer: estimators.in_groups(doubled, like, learner, outer, episodes, seed))(outer)
    np.testing.assert_array_equal(found, 2.0 * ops.convert_to_numpy(outer[min(outer)]))  # in order
    assert seen == {expected}
