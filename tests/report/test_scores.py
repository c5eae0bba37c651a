"""Scores on many episodes: they are those of the learner, and the gap tells memory from reading."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from task_harness import take

from keras_blur import Genome, learners, random, tasks
from keras_blur.report.episodes import adaptation_curve, memorization_gap, score_episodes


def process():
    """A neural process with weights from random numbers."""
    learner = learners.NeuralProcess((8,), 4)
    return learner, learner.learned({name: own[0] for name, own in learner.draw(0, 1, 10, 2).items()})


def test_scores_are_of_the_learner_on_the_episodes_of_the_split():
    learner, learned = process()
    of = tasks.pose(held=7)
    found = score_episodes(learner, learned, of, batch_size=4, query_size=6, episodes=53, split="test", seed=2)
    wanted = []
    for drawn in take(of.dataset(2, steps=1, batch=4, query=6, split="test"), 53):
        prediction = learned([drawn["x"], drawn["y"], drawn["query_x"][None]])[0]
        wanted.append(np.mean((ops.convert_to_numpy(prediction) - drawn["query_y"]) ** 2))
    np.testing.assert_allclose(found["loss"], wanted, rtol=1e-4)
    assert found["mean_loss"] == pytest.approx(np.mean(wanted), rel=1e-4)
    assert found["r2"].shape == (53,)


def test_the_gap_is_what_a_key_of_the_episode_costs():
    learner, learned = process()
    of = tasks.pose()
    found = memorization_gap(learner, learned, of, episodes=6)
    drawn = take(of.dataset(0, steps=1, batch=5, query=10, split="train"), 6)
    turn = tasks.LabelRotation()
    keys = ops.convert_to_numpy(turn.draw(random.fold_in(random.seed_of(0), 2, 0), 6, of))
    wanted = {"own": [], "kept": [], "followed": []}
    for key, one in zip(keys, drawn, strict=True):
        y, query_y = (ops.convert_to_numpy(turn.apply(key[None], labels)) for labels in (one["y"][0], one["query_y"]))
        for name, support, query in (
            ("own", one["y"], one["query_y"]),
            ("kept", y[None], one["query_y"]),
            ("followed", y[None], query_y),
        ):
            prediction = ops.convert_to_numpy(learned([one["x"], support, one["query_x"][None]])[0])
            wanted[name].append(np.mean((prediction - query) ** 2))
    for name, values in wanted.items():
        assert found[name] == pytest.approx(np.mean(values), rel=1e-4)
    assert found["gap"] == found["followed"] - found["own"]


class Answers(learners.NeuralProcess):
    """Knows the pose of each object by its code, reads it from the support, or says nothing."""

    def __init__(self, how, of):
        super().__init__(network=(4,), representation=2)
        self.how, self.codes, self.angles = how, *map(ops.array, of._objects["train"])

    def init(self, outer, seed, features, outputs, shape=(), shard=None):
        return ops.zeros((*shape, 2))

    def step(self, outer, state, x, y):
        if self.how == "reads":
            cosine, sine = x[..., -2:-1], x[..., -1:]
            turn = ops.concatenate([cosine * y[..., :1] + sine * y[..., 1:], cosine * y[..., 1:] - sine * y[..., :1]], -1)
            return ops.mean(turn, -2), {}
        if self.how == "knows":
            place = ops.argmin(ops.sum((x[..., :1, None, :-2] - self.codes) ** 2, -1), -1)[..., 0]
            angle = ops.take(self.angles, place)
            return ops.stack([ops.cos(angle), ops.sin(angle)], -1), {}
        return state, {}

    def predict(self, outer, state, x):
        cosine, sine = x[..., -2:-1], x[..., -1:]
        c, s = state[..., None, :1], state[..., None, 1:]
        return ops.concatenate([c * cosine - s * sine, c * sine + s * cosine], -1)


@pytest.mark.parametrize(
    ("how", "own", "kept", "followed"), [("reads", 0.0, 1.0, 0.0), ("knows", 0.0, 0.0, 1.0), ("nothing", 0.5, 0.5, 0.5)]
)
def test_the_gap_tells_memorisation_from_reading_and_from_ignorance(how, own, kept, followed):
    of = tasks.pose()
    learner = Answers(how, of)
    learned = learner.learned({name: values[0] for name, values in learner.draw(0, 1, 10, 2).items()})
    found = memorization_gap(learner, learned, of, episodes=200, jit_compile=False)
    assert found["own"] == pytest.approx(own, abs=1e-5)
    assert found["kept"] == pytest.approx(kept, abs=0.15)
    assert found["followed"] == pytest.approx(followed, abs=0.15)


def test_the_gap_of_classes_permutes_them_and_other_tasks_need_a_key():
    learner = learners.Prototypes((4,))
    learned = learner.learned({name: own[0] for name, own in learner.draw(0, 1, 64, 5).items()})
    found = memorization_gap(learner, learned, tasks.classes(), query_size=25, episodes=4)
    assert found["gap"] == pytest.approx(0.0, abs=1e-4)  # prototypes know no class
    assert found["kept"] > found["own"]
    process = learners.NeuralProcess((8,), representation=4)
    learned = process.learned({name: own[0] for name, own in process.draw(0, 1, 1, 1).items()})
    with pytest.raises(ValueError, match="`augmentation` must be given for tasks that are neither classes nor two values"):
        memorization_gap(process, learned, tasks.sines(), episodes=4)
    found = memorization_gap(process, learned, tasks.sines(), tasks.LabelOffset(-1.0, 1.0), episodes=4)
    assert found["followed"] != found["own"]
    with pytest.raises(ValueError, match="`augmentation` must change labels by a key"):
        memorization_gap(learner, learned, tasks.classes(exclusive=False), tasks.ClassResample(), episodes=4)


@pytest.mark.parametrize("score", [score_episodes, memorization_gap, functools.partial(adaptation_curve, at=[0, 1])])
def test_a_population_is_refused(score):
    learner = learners.Blur((4,))
    population = Genome.random(learner.rule, 0, population=(3,))
    with pytest.raises(ValueError, match=r"`learned` must be a single result of meta-training. Received: 3 members"):
        score(learner, population, tasks.functions("xor"), episodes=2)


def test_divergence_is_the_worst_score():
    learner, learned = process()
    broken = {name: np.full_like(own[0], np.nan) for name, own in learner.parameters(learned).items()}
    found = score_episodes(learner, learner.learned(broken), tasks.pose(), episodes=2)
    assert found["mean_loss"] == np.inf
    assert found["mean_r2"] == -np.inf


def test_a_curve_is_the_score_after_each_number_of_steps():
    learner = learners.MAML(keras.optimizers.SGD(0.1), (8,))
    learned = learner.learned({name: own[0] for name, own in learner.draw(0, 1, 64, 5).items()})
    of, shape = tasks.classes(shots=2), {"batch_size": 5, "query_size": 10, "episodes": 9}
    curve = adaptation_curve(learner, learned, of, at=[0, 1, 4], **shape)
    assert curve["steps"] == [0, 1, 4]
    for place, steps in ((1, 1), (2, 4)):
        single = score_episodes(learner, learned, of, steps=steps, **shape)
        np.testing.assert_allclose(curve["loss"][place], single["loss"], rtol=1e-4)
        assert curve["mean_accuracy"][place] == pytest.approx(single["mean_accuracy"])
    zero, one, four = curve["mean_loss"]
    assert curve["area"] == pytest.approx(((zero + one) / 2 + 3 * (one + four) / 2) / 4)
    with pytest.raises(ValueError, match="`at` must be two or more ascending numbers"):
        adaptation_curve(learner, learned, of, at=[3, 1], **shape)
    with pytest.raises(ValueError, match="`episodes` must be an integer of at least 2"):
        score_episodes(learner, learned, of, episodes=1)
    with pytest.raises(ValueError, match="`episodes` must be an integer of at least 2"):
        adaptation_curve(learner, learned, of, at=[0, 1], **{**shape, "episodes": 1})
