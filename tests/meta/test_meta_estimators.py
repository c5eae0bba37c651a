"""MetaTrainer with every estimator: it learns, resumes bit for bit after a kill, validates, mixes
tasks, learns values."""

import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_blur import Rule, genomes, learners, meta, tasks

RULE = Rule(last_activation="linear", normalize_activations="both", normalize_synapses="stored", batch_reduction="mean")

ESTIMATORS = {
    "truncated": lambda: meta.TruncatedUnroll(2, trajectory_loss_weight=1.0, episode_steps=6),
    "es": lambda: meta.ES(2, antithetic_pairs=4),
    "pes": lambda: meta.PES(2, antithetic_pairs=4, episode_steps=6),
    "warpgrad": lambda: meta.WarpGrad(2),
    "offline": lambda: meta.OfflineWarpGrad(3),
    "evolution": lambda: meta.Evolution(3, population=6, fitness="loss"),
}


def trainer(estimator, of=None, *, hidden=(6,), rate=1e-2, jit_compile=False, **options):
    made = meta.MetaTrainer(
        of or [tasks.functions(["xor", "circle"]), tasks.functions("blobs3")],
        learners.Blur(hidden, RULE),
        estimator,
        **{"batch_size": 12, "query_size": 24, "clipnorm": 1.0, **options},
    )
    optimizer = None if isinstance(estimator, meta.Evolution) else keras.optimizers.Adam(rate)
    made.compile(optimizer, jit_compile=jit_compile)
    return made


def state(made):
    return [np.array(variable.value) for variable in made.variables]


RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import keras
from test_meta_estimators import ESTIMATORS, trainer
made = trainer(ESTIMATORS[{name!r}](), seed=4)
class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.meta_step.value) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
made.fit(4, 5, checkpoint={path!r}, callbacks=[Kill()], verbose=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_resume_after_kill_is_bit_for_bit(name, tmp_path):
    path = str(tmp_path / "run.weights.h5")
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(tests=os.path.dirname(__file__), path=path, name=name)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    resumed, unbroken = (trainer(ESTIMATORS[name](), seed=4) for _ in range(2))
    assert resumed.fit(4, 5, checkpoint=path, verbose=0).epoch == [2, 3]
    unbroken.fit(4, 5, verbose=0)
    assert np.array(unbroken.drawn.value).min() > 0  # both families were met, and inside episodes of three pieces
    for one, other in zip(state(resumed), state(unbroken), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_evolution_learns_from_random_numbers():
    estimator, of = meta.Evolution(8, population=16, fitness="loss"), tasks.functions("blobs2", relabel=True)
    made = trainer(estimator, of, jit_compile=True, meta_batch_size=4, hidden=(8,), seed=1)
    history = made.fit(4, 20, verbose=0).history
    assert set(history) == {"loss", "accuracy", "best", "sigma", "skipped"}
    assert history["accuracy"][-1] > history["accuracy"][0] + 0.05
    assert history["best"][-1] > 0.9
    assert made.genome.rule == RULE
    assert made.genome.population == ()
    assert made.population == made.genome


def test_evolution_errors():
    with pytest.raises(ValueError, match="`members` must be 1"):
        trainer(meta.Evolution(population=4), members=2)
    made = trainer(meta.Evolution(population=4))
    with pytest.raises(ValueError, match="`optimizer` must be None under Evolution"):
        made.compile(keras.optimizers.Adam())


def test_an_unroll_in_pieces_cannot_grow():
    made = trainer(meta.PES(2, antithetic_pairs=2, episode_steps=4))
    with pytest.raises(ValueError, match="unroll of PES cannot change"):
        made.unroll_for(4)
    with pytest.raises(ValueError, match="unroll of PES cannot change"):
        made.fit(2, 1, callbacks=[meta.UnrollCurriculum([(0, 2), (1, 4)])], verbose=0)
    assert int(made.meta_step.value) == 0
    made.fit(1, 1, callbacks=[meta.UnrollCurriculum([(0, 2), (1, 2)])], verbose=0)


@pytest.mark.parametrize(
    ("windowed", "whole"),
    [
        (lambda: meta.TruncatedUnroll(2, episode_steps=2), lambda: meta.Unroll(2)),
        (lambda: meta.PES(2, antithetic_pairs=2, episode_steps=2), lambda: meta.ES(2, antithetic_pairs=2)),
        (lambda: meta.OfflineWarpGrad(2, thetas=2), None),
    ],
)
def test_one_window_is_the_whole_episode(windowed, whole):
    windowed = trainer(windowed())
    history = windowed.fit(1, 3, verbose=0).history
    assert np.isfinite(history["loss"][0])
    assert history["gradient_norm"][0] > 0.0
    with pytest.raises(ValueError, match="carries learners"):
        windowed.unroll_for(1)
    if whole is not None:
        other = trainer(whole())
        other.fit(1, 3, verbose=0)
        for name, value in other.parameters().items():
            np.testing.assert_allclose(windowed.parameters()[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_validation_scores_the_steps_of_the_given_estimator_after_a_curriculum():
    made = trainer(meta.Unroll(1), rate=0.0)

    def scores(epochs, begin):
        callbacks = [meta.UnrollCurriculum([(0, 1), (1, 4)]), meta.MetaValidate(tasks.functions("xor"), episodes=4)]
        return made.fit(epochs, 1, initial_epoch=begin, callbacks=callbacks, verbose=0).history["val_loss"]

    assert len({*scores(2, 0), *scores(3, 2)}) == 1


def test_a_curriculum_keeps_the_other_options():
    made = trainer(meta.ES(2, antithetic_pairs=3, sigma=0.2, trajectory_loss_weight=0.5))
    made.unroll_for(5)
    assert made.estimator == meta.ES(5, antithetic_pairs=3, sigma=0.2, trajectory_loss_weight=0.5)


def test_a_mixture_is_taken_by_weight():
    parts = tasks.functions(["xor", "circle"]), tasks.functions("blobs3")
    made = trainer(meta.Unroll(2), tasks.mixture({parts[0]: 1.0, parts[1]: 3.0}), seed=2)
    taken = np.bincount([made.family_of(step) for step in range(4000)], minlength=2)
    assert taken[1] == pytest.approx(3000, abs=4 * (4000 * 0.75 * 0.25) ** 0.5)
    made.fit(1, 4, verbose=0)
    np.testing.assert_array_equal(made.drawn.value, np.bincount([made.family_of(step) for step in range(4)], minlength=2))


@pytest.mark.slow
def test_values_are_learned():
    made = trainer(
        meta.Unroll(5, trajectory_loss_weight=1.0),
        tasks.functions("sine"),
        jit_compile=True,
        hidden=(16,),
        meta_batch_size=4,
        rate=3e-2,
    )
    history = made.fit(4, 50, verbose=0).history
    assert set(history) == {"loss", "r2", "gradient_norm", "skipped"}
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    # R squared has no lower bound: one flat sine decides over the mean of an epoch.
    assert 1.0 > max(history["r2"][1:]) > history["r2"][0]
    assert made.estimator.kind == "values"


def test_kinds_cannot_be_mixed():
    parts = [tasks.functions("sine"), tasks.functions("xor")]
    with pytest.raises(ValueError, match=r"`tasks` must be.*of one kind.*sine \(values\)"):
        trainer(meta.Unroll(2), parts)
    with pytest.raises(ValueError, match="one kind"):
        tasks.mixture([(part, 1.0) for part in parts])


@pytest.mark.slow
@pytest.mark.usefixtures("eagerly")
def test_validation_is_logged_for_later_callbacks_and_the_best_genome_is_kept(tmp_path):
    made = trainer(meta.Unroll(3))
    check = meta.MetaValidate(tasks.functions("blobs3"), episodes=4, path=tmp_path / "best.json", steps=4)
    csv = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    kept, genomes_seen = [], []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            kept.append(logs["val_accuracy"])
            genomes_seen.append(self.model.genome)

    history = made.fit(3, 4, callbacks=[check, csv, Watch()], verbose=0).history
    assert history["val_accuracy"] == kept
    assert len(set(kept)) > 1
    assert "val_loss" in (tmp_path / "log.csv").read_text()
    best = genomes_seen[int(np.argmax(kept))]
    assert genomes.load(tmp_path / "best.json") == best
    assert check.best == max(kept)
    again = meta.MetaValidate(tasks.functions("blobs3"), episodes=4, path=tmp_path / "best.json", steps=4)
    made.fit(1, 1, callbacks=[again], verbose=0)  # goes on: the file's score is found again, and beaten or kept
    assert again.best >= max(kept)


@pytest.mark.parametrize(
    ("estimator", "steps"),
    [(meta.Unroll(3), 3), (meta.TruncatedUnroll(2, episode_steps=6), 6), (meta.PES(2, episode_steps=8), 8)],
)
def test_validation_goes_to_the_end_of_an_episode(estimator, steps):
    check = meta.MetaValidate(tasks.functions("xor"), episodes=4)
    check.set_model(trainer(estimator, tasks.functions("xor")))
    check.on_train_begin()
    assert check._data[0]["x"].shape[:2] == (4, steps)


def test_validation_errors():
    with pytest.raises(ValueError, match="`episodes` must be a positive integer"):
        meta.MetaValidate(tasks.functions("xor"), episodes=0)
    check = meta.MetaValidate(tasks.functions("xor"), learners.Blur((4,), Rule(states=3)))
    with pytest.raises(ValueError, match="must share the outer parameters"):
        trainer(meta.Unroll(2)).fit(1, 1, callbacks=[check], verbose=0)


@pytest.mark.parametrize(
    "given", [{}, [("xor", 1.0)], [(tasks.functions("xor"), 0.0)], [(tasks.functions("xor"), float("nan"))]]
)
def test_mixture_errors(given):
    with pytest.raises(ValueError, match="`weights` must"):
        tasks.mixture(given)
