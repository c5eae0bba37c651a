"""What meta-augmentation is for: a key of the episode keeps a learner from memorising its tasks."""

import keras
import pytest

from keras_blur import learners, meta, tasks
from keras_blur.report.episodes import memorization_gap, score_episodes


def trained(of, seed, steps):
    made = meta.MetaTrainer(of, learners.NeuralProcess(), meta.Unroll(1), meta_batch_size=32, batch_size=5, query_size=10,
                            clipnorm=None, seed=seed)  # fmt: skip
    made.compile("adam")
    made.fit(1, steps, verbose=0)
    return made


@pytest.mark.slow
def test_a_shared_key_saves_pose_from_memorisation():
    """The claim of the paper on the synthetic pose set: a key of the episode helps, one of each
    point does not."""
    plain, seed = tasks.pose(), 0
    arms = {
        "none": plain,
        "shared": tasks.augment(plain, tasks.LabelRotation()),
        "points": tasks.augment(plain, tasks.LabelRotation(), shared=False),
    }
    runs = {name: trained(of, seed, 4000) for name, of in arms.items()}
    error = {name: score_episodes(run.learner, run.learned, plain)["mean_loss"] for name, run in runs.items()}
    assert error["shared"] <= 0.03
    assert error["none"] >= 15 * error["shared"]
    assert error["points"] >= 10 * error["shared"]
    gap = {name: memorization_gap(run.learner, run.learned, plain)["gap"] for name, run in runs.items()}
    assert gap["none"] > 0.1
    assert abs(gap["shared"]) < 0.01
    assert abs(gap["points"]) < 0.02
    new = memorization_gap(runs["none"].learner, runs["none"].learned, plain, split="test")
    assert abs(new["gap"]) < 0.02


@pytest.mark.slow
def test_shuffles_help_as_in_the_paper():
    """Five ways, one shot, MAML on the made classes: non-exclusive below intra-shuffle, not above
    inter-shuffle."""
    found = {}
    plain = tasks.classes(exclusive=False)
    settings = {"non": tasks.Compose([]), "intra": tasks.LabelPermutation(), "inter": tasks.ClassResample()}
    for name, augmentation in settings.items():
        of = tasks.augment(plain, augmentation)
        learner = learners.MAML(keras.optimizers.SGD(0.1), (64,))
        run = meta.MetaTrainer(of, learner, meta.Unroll(3), meta_batch_size=4, batch_size=5, query_size=25, seed=0)
        run.compile("adam")
        run.fit(1, 1500, verbose=0)
        scored = score_episodes(learner, run.learned, of, steps=3, batch_size=5, query_size=25, episodes=400)
        found[name] = scored["mean_accuracy"]
    assert found["intra"] >= found["non"] + 0.04
    assert found["inter"] >= found["intra"] - 0.01
