"""The outer loop: it learns, resumes bit for bit after a kill, and a member that diverges is
skipped and counted."""

import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from marks import slow_but

from keras_blur import Genome, Rule, cli, genomes, learners, meta, tasks
from keras_blur.cli import meta_train
from keras_blur.cli.meta_train import parse_rule
from keras_blur.report.evaluation import evaluate
from keras_blur.tasks.datasets import load_images

JAX = keras.backend.backend() == "jax"  # here, as processes of their own import this file
RULE = Rule(last_activation="linear", normalize_activations="both", normalize_synapses="stored", batch_reduction="mean")


def trainer(learner=None, of=None, *, rate=1e-2, jit_compile=False, steps=3, **options):
    made = meta.MetaTrainer(
        of or tasks.images("digits", classes=range(3)),
        learner or learners.Blur((8,), RULE),
        meta.Unroll(steps, trajectory_loss_weight=1.0),
        **{"batch_size": 16, "query_size": 32, "clipnorm": 1.0, **options},
    )
    made.compile(keras.optimizers.Adam(rate), jit_compile=jit_compile, run_eagerly=not (jit_compile or JAX))
    return made


def state(made):
    return [np.array(variable.value) for variable in [*made.weights, *made.optimizer.variables]]


def assert_equal(first, second):
    for one, other in zip(state(first), state(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_it_learns_from_random_numbers():
    made = trainer(members=2, jit_compile=True, rate=3e-2)
    history = made.fit(4, 60, verbose=0).history
    assert set(history) == {"loss", "accuracy", "gradient_norm", "skipped"}
    assert history["accuracy"][-1] > 0.75 > history["accuracy"][0]
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert history["skipped"] == [0.0] * 4
    assert made.genome.population == ()
    assert made.population.population == (2,)
    assert int(made.meta_step.value) == 240


@pytest.mark.parametrize("name", ["predict", "evaluate", "predict_on_batch", "test_on_batch", "train_on_batch"])
def test_it_has_no_methods_that_work_on_examples(name):
    made = trainer()
    assert hasattr(keras.Model, name)
    assert not hasattr(made, name)
    with pytest.raises(AttributeError, match=f"MetaTrainer has no `{name}`: .*score_episodes"):
        getattr(made, name)


@pytest.mark.slow
def test_keras_s_own_backup_resumes_to_the_same_numbers(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))

    unbroken, broken, again = trainer(), trainer(), trainer()
    unbroken.fit(3, 2, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(3, 2, callbacks=[backup(), Stop()], verbose=0)
    assert len(again.fit(3, 2, callbacks=[backup()], verbose=0).history["loss"]) == 1
    assert_equal(again, unbroken)


def test_devices_divide_tasks_or_members(monkeypatch):
    kind = type(trainer().runner)
    monkeypatch.setattr(kind, "shares", 4)
    monkeypatch.setattr(kind, "splits_members", True)  # as on JAX
    assert trainer(members=8, meta_batch_size=3).members == 8
    message = "^`meta_batch_size` or `members` must be a multiple of the 4 devices. Received: meta_batch_size=3, members=2$"
    with pytest.raises(ValueError, match=message):
        trainer(members=2, meta_batch_size=3)


@pytest.mark.slow
def test_equal_seeds_give_equal_runs():
    runs = [trainer(seed=seed) for seed in (1, 1, 2)]
    for made in runs:
        made.fit(1, 3, verbose=0)
    assert_equal(runs[0], runs[1])
    assert np.abs(runs[0].genome.nu - runs[2].genome.nu).max() > 0.1


def status_of(program):
    """The exit status of a program that imports this file."""
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode


RUN = """
import os, signal
import keras
from keras_blur import meta
from test_meta_trainer import several
made = several()
class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.meta_step.value) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
made.fit(3, 2, checkpoint={path!r}, callbacks=[meta.UnrollCurriculum([(0, 2), (1, 3)]), Kill()], verbose=0)
"""


def several():
    digits = [tasks.images("digits", classes=range(3)), tasks.images("digits", size=6, relabel=True)]
    return trainer(learners.Blur((8,), RULE), digits, members=2, meta_batch_size=2, steps=2)


def test_resume_after_kill_is_bit_for_bit(tmp_path):
    path = str(tmp_path / "run.weights.h5")
    assert status_of(RUN.format(path=path)) == -signal.SIGKILL
    curriculum = [(0, 2), (1, 3)]
    resumed, unbroken = several(), several()
    history = resumed.fit(3, 2, checkpoint=path, callbacks=[meta.UnrollCurriculum(curriculum)], verbose=0)
    assert history.epoch == [1, 2]  # a whole epoch was saved before the kill in the second
    unbroken.fit(3, 2, callbacks=[meta.UnrollCurriculum(curriculum)], verbose=0)
    assert_equal(resumed, unbroken)
    assert sum(np.array(resumed.drawn.value)) == 6
    assert sorted(os.listdir(tmp_path)) == ["run.weights.h5"]


class Terminate(keras.callbacks.Callback):
    """Sends this process SIGTERM at a meta-step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.meta_step.value) == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "step"), [("disk", 3), ("bucket", 4)])
def test_sigterm_saves_inside_an_epoch_and_resumes_bit_for_bit(step, folder, tmp_path):
    # TensorFlow's file system in memory stands for a bucket: nothing but its own functions can read
    # it.
    path = f"{tmp_path if folder == 'disk' else f'ram://{step}'}/run.weights.h5"
    handler, rows = signal.getsignal(signal.SIGTERM), tmp_path / "rows.csv"
    curriculum = [(0, 2), (1, 3)]  # the best member is copied to all where the second epoch begins, and only there

    def following(*more):
        return [meta.UnrollCurriculum(curriculum), keras.callbacks.CSVLogger(str(rows), append=True), *more]

    with pytest.raises(SystemExit) as ended:
        several().fit(3, 2, checkpoint=path, callbacks=following(Terminate(step)), verbose=0)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed, unbroken = several(), several()
    history = resumed.fit(3, 2, checkpoint=path, callbacks=following(), verbose=0)
    whole = unbroken.fit(3, 2, callbacks=[meta.UnrollCurriculum(curriculum)], verbose=0)
    assert_equal(resumed, unbroken)
    assert history.epoch == list(range(step // 2, 3))
    for name, values in whole.history.items():  # of the broken epoch too: its running means went on
        assert history.history[name] == values[history.epoch[0] :]
    assert [line.split(",")[0] for line in rows.read_text().splitlines()] == ["epoch", "0", "1", "2"]


@pytest.mark.slow
def test_a_checkpoint_counts_the_epochs_of_its_own_fit(tmp_path):
    path, made = tmp_path / "run.weights.h5", trainer()
    made.fit(1, 5, verbose=0)
    assert made.fit(1, 3, checkpoint=path, verbose=0).epoch == [0]
    resumed = trainer()
    assert resumed.fit(2, 3, checkpoint=path, verbose=0).epoch == [1]
    assert int(resumed.meta_step.value) == 11


@pytest.mark.slow
def test_a_curriculum_synchronizes_where_an_epoch_begins_whatever_was_trained_before(monkeypatch):
    made, copied = trainer(members=2), []
    made.fit(1, 5, verbose=0)
    monkeypatch.setattr(made, "synchronize", lambda: copied.append(int(made.meta_step.value)))
    made.fit(2, 3, callbacks=[meta.UnrollCurriculum([(0, 2), (1, 3)])], verbose=0)
    assert copied == [8]


@pytest.mark.slow
def test_sigterm_without_a_checkpoint_ends_the_process_as_ever():
    program = "import os, signal; from test_meta_trainer import *; trainer().fit(1, 9, callbacks=[Terminate(2)], verbose=0)"
    assert status_of(program) == -signal.SIGTERM


def test_a_diverged_member_is_skipped_counted_and_does_not_spread():
    population = Genome.random(RULE, 0, std=0.5, synapse_update=-0.01, population=(2,))
    broken = population.replace(nu=population.nu * np.array([1.0, np.finfo("float32").max], "float32")[:, None, None])
    single = Genome(RULE, {name: array[0] for name, array in population.arrays.items()})
    both, alone = trainer(start=broken, members=2), trainer(start=single)
    history = both.fit(1, 4, verbose=0).history
    alone.fit(1, 4, verbose=0)
    assert history["skipped"] == [0.5]
    assert np.isfinite(history["loss"][0])
    for name, array in alone.genome.arrays.items():
        np.testing.assert_allclose(both.population.arrays[name][0], array, rtol=2e-4, atol=1e-6)
        np.testing.assert_array_equal(both.population.arrays[name][1], broken.arrays[name][1])
    assert both.best == 0


def test_synchronize_copies_the_best_with_its_optimizer_state():
    made = trainer(members=3)
    made.fit(1, 3, verbose=0)
    best = made.best
    before = {name: np.array(v.value)[best] for name, v in made.outer.items()}
    made.synchronize()
    for name, value in made.outer.items():
        for member in range(3):
            np.testing.assert_array_equal(np.array(value.value)[member], before[name])
    for slot in made.strategy.slots():
        np.testing.assert_array_equal(np.array(slot.value)[0], np.array(slot.value)[2])


CARRYING = {
    "truncated": lambda: meta.TruncatedUnroll(1, episode_steps=3),
    "pes": lambda: meta.PES(1, episode_steps=3, antithetic_pairs=2),
}


def carrying(name):
    made = meta.MetaTrainer(
        tasks.functions("blobs2"), learners.Blur((4,), RULE), CARRYING[name](), members=2, batch_size=4, query_size=8
    )
    made.compile(keras.optimizers.SGD(1e-2), run_eagerly=not JAX)
    return made


@pytest.mark.parametrize("name", slow_but(["truncated"], CARRYING))
def test_new_episodes_begin_after_a_synchronisation(name, monkeypatch):
    """The carried learners are those of members that are no more."""
    made, drawn = carrying(name), []
    given = made._episodes

    def noted(family, window):
        drawn.append((window, given(family, window)))
        return drawn[-1][1]

    monkeypatch.setattr(made, "_episodes", noted)
    made.fit(1, 2, verbose=0)
    made.synchronize()
    made.synchronize()  # nothing is left behind any more
    made.fit(1, 2, verbose=0)
    assert [window for window, _ in drawn] == [0, 1, 0, 1]
    first, again, second, _ = (np.array(episodes["x"]) for _, episodes in drawn)
    np.testing.assert_array_equal(first, again)
    stream = made.families[0][0].dataset(0, steps=3, batch=4, query=8)
    for wanted, found in zip(stream, (first, second), strict=False):
        np.testing.assert_array_equal(found[0], np.array(wanted["x"]))


def test_a_run_that_synchronises_inside_an_episode_resumes_bit_for_bit(tmp_path):
    path, whole, first, second = tmp_path / "run.weights.h5", *(carrying("truncated") for _ in range(3))
    same = [(0, 1), (1, 1)]  # the second epoch begins with copies of the best member
    whole.fit(2, 2, callbacks=[meta.UnrollCurriculum(same)], verbose=0)
    first.fit(1, 2, callbacks=[meta.UnrollCurriculum(same)], checkpoint=path, verbose=0)
    second.fit(2, 2, callbacks=[meta.UnrollCurriculum(same)], checkpoint=path, verbose=0)
    assert_equal(second, whole)
    assert int(np.array(whole.drawn.value)[0]) == 5  # three of the first episodes, of which two ran, and two of the next


def test_gradient_of_each_member_is_clipped():
    free, tight = trainer(members=2, clipnorm=None), trainer(members=2, clipnorm=1e-3)
    for made in (free, tight):
        made.compile(keras.optimizers.SGD(1.0), run_eagerly=not JAX)
    start = {name: np.array(value.value) for name, value in free.outer.items()}
    lengths = []
    for made in (free, tight):
        made.fit(1, 1, verbose=0)
        moved = [np.array(value.value) - start[name] for name, value in made.outer.items()]
        lengths.append(np.sqrt(sum(np.sum(m.reshape(2, -1) ** 2, axis=1) for m in moved)))
    np.testing.assert_allclose(lengths[1], 1e-3, rtol=1e-2)
    assert lengths[0].min() > 2e-3


def test_callbacks_write_the_genome_and_lengthen_the_unroll(tmp_path):
    made = trainer()
    curriculum = meta.UnrollCurriculum([(0, 2), (1, 4)])
    callbacks = [curriculum, meta.SaveLearned(tmp_path / "g.json"), keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    made.fit(2, 2, callbacks=callbacks, verbose=0)
    assert made.estimator.steps == 4
    assert genomes.load(tmp_path / "g.json") == made.genome
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3
    assert [curriculum.steps_at(epoch) for epoch in (0, 1, 9)] == [2, 4, 4]


def test_a_resumed_run_names_the_file_of_another_rule(tmp_path):
    best, path = tmp_path / "best.json", tmp_path / "run.weights.h5"
    trainer().fit(1, 1, checkpoint=path, verbose=0)
    genomes.backprop().save(best)
    validate = meta.MetaValidate(tasks.functions("xor"), episodes=2, path=best)
    with pytest.raises(
        ValueError, match=r"^`path` of MetaValidate must be a new file, or one .*Received: path=.*best\.json"
    ):
        trainer().fit(2, 1, checkpoint=path, callbacks=[validate], verbose=0)


@pytest.mark.parametrize("stages", [[], [(1, 5)], [(0, 5), (0, 6)], [(0, 0)]])
def test_curriculum_errors(stages):
    with pytest.raises(ValueError, match="`stages` must"):
        meta.UnrollCurriculum(stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "`members` must be a positive integer"),
        ({"batch_size": 2.5}, "`batch_size` must be a positive integer"),
        ({"clipnorm": 0.0}, "`clipnorm` must be a positive number"),
        ({"seed": 2**31}, r"`seed` must be at most 2\*\*31 - 1"),
        ({"start": genomes.backprop()}, "`start` must be a genome of the learner's rule"),
        ({"learner": [learners.Blur((4,), RULE), learners.Blur((4,))]}, "learners that share outer parameters"),
        ({"learner": learners.Blur((4,), Rule(layers=3))}, "must have 3 layers"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


def test_errors_of_values_need_a_loss_of_values():
    sine, options = tasks.functions("sine"), {"batch_size": 8, "query_size": 8}
    for loss in (None, "categorical_crossentropy"):
        learner = learners.Blur((4,), Rule(feedback="error", loss=loss))
        with pytest.raises(ValueError, match="loss fits values"):
            meta.MetaTrainer(sine, learner, meta.Unroll(2), **options)
    made = meta.MetaTrainer(sine, learners.Blur((4,), genomes.backprop(loss="mean_squared_error").rule), **options)
    assert made.quality == "r2"


def test_options_of_a_rule_are_read_by_their_type():
    texts = ["whitening=True", "whitening_rows=128", "whitening_positions=16", "oja_factor=0.5", "momentum=after"]
    texts += ["normalize_term=frobenius", "term_rank=8"]
    wanted = {"whitening": True, "whitening_rows": 128, "whitening_positions": 16, "oja_factor": 0.5, "momentum": "after"}
    wanted |= {"normalize_term": "frobenius", "term_rank": 8}
    assert parse_rule(texts, states=3) == Rule(states=3, **wanted)


@pytest.mark.slow
def test_a_rule_that_learns_from_errors_is_meta_trained(tmp_path):
    """From the backprop genome, its rule made richer on the way in: on test images the new numbers
    learn faster."""
    path = tmp_path / "g.json"
    arguments = ["--start=backprop", "--rule=momentum=before,update_decay=power", "--unroll=5", "--members=1", "--hidden=16"]
    sizes = ["--epochs=1", "--steps_per_epoch=30", "--batch_size=32", "--query_size=64", "--learning_rate=1e-3"]
    sizes.append("--nojit_compile")
    assert cli.run(["meta-train", *arguments, *sizes, f"--genome={path}"]) == 0
    found, start = Genome.load(path), genomes.backprop()
    assert found.rule == start.rule.replace(momentum="before", update_decay="power")
    assert found.momentum != 0
    options = {"steps": 5, "seeds": 3, "batch_size": 32}
    losses = [
        np.mean(evaluate(genome, load_images(), (16,), **options)["curves"]["genome"]["loss"], axis=0)[-1]
        for genome in (found, start)
    ]
    assert losses[0] < 0.95 * losses[1]


def test_compile_errors():
    made = trainer()
    with pytest.raises(ValueError, match="must not clip"):
        made.compile(keras.optimizers.Adam(1e-3, global_clipnorm=1.0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss'"):
        made.compile(loss="mse")


@pytest.mark.usefixtures("eagerly")
def test_shell(tmp_path, capsys):
    genome, numbers = tmp_path / "g.json", tmp_path / "n.json"
    size = ["--hidden=8", "--hidden=6,6", "--members=2", "--unroll=2,3", "--epochs=2", "--steps_per_epoch=2"]
    rule = "--rule=oja=weights,update_decay=power"
    arguments = ["meta-train", *size, rule, f"--genome={genome}", f"--json={numbers}"]
    assert cli.run(arguments) == 0
    assert "wrote" in capsys.readouterr().out
    rule = genomes.load(genome).rule
    assert (rule.oja, rule.update_decay, rule.normalize_activations) == ("weights", "power", "both")
    assert numbers.exists()


@pytest.mark.usefixtures("eagerly")
def test_shell_with_a_convolutional_and_a_dense_network(tmp_path):
    genome, numbers = tmp_path / "g.json", tmp_path / "n.json"
    size = ["--members=1", "--unroll=1", "--epochs=1", "--steps_per_epoch=2", "--batch_size=4", "--query_size=8"]
    network = ["--network=lenet,mlp", "--hidden=6", "--sizes=6"]
    assert cli.run(["meta-train", *network, *size, f"--genome={genome}", f"--json={numbers}"]) == 0
    assert genomes.load(genome).rule.normalize_activations == "both"
    assert json.loads(numbers.read_text())["history"]["skipped"] == [0.0]
    assert [callable(one.network) for one in meta_train._networks(["lenet", "mlp"], [(6,)], RULE)] == [True, False]


@pytest.mark.usefixtures("eagerly")
def test_shell_normalises_patterns_one_at_a_time_over_units(tmp_path):
    """Over a batch of one pattern, every normalised sum would be the learned shift."""
    genome = tmp_path / "g.json"
    size = ["--members=1", "--unroll=1", "--epochs=1", "--steps_per_epoch=1", "--hidden=4", "--query_size=4"]
    given = ["meta-train", "--synthetic=remember", *size, f"--genome={genome}", "--overwrite"]
    assert cli.run(given) == 0
    assert genomes.load(genome).rule.normalization_axis == "units"
    assert cli.run([*given, "--batch_size=2"]) == 0
    assert genomes.load(genome).rule.normalization_axis == "batch"


def test_a_batch_of_one_is_not_normalised_over_the_batch():
    with pytest.raises(
        ValueError, match=r"`batch_size` and `query_size` must be 2 or more .* Received: batch_size=1, query"
    ):
        trainer(batch_size=1)
    with pytest.raises(ValueError, match=r"`batch_size` and `query_size` must be 2 or more .* query_size=1$"):
        trainer(query_size=1)
    rule = Rule(batch_reduction="mean", normalize_activations="both", normalization_axis="units")
    assert trainer(learners.Blur((8,), rule), batch_size=1).batch_size == 1
    assert trainer(learners.Blur((8,), Rule(batch_reduction="mean")), batch_size=1).batch_size == 1


METHODS = {
    "maml": ["--synthetic=classes", "--noexclusive", "--augment=labels", "--first_order"],
    "prototypes": ["--ways=2", "--shots=3", "--augment=classes", "--noexclusive"],
    "neural_process": ["--synthetic=pose", "--augment=rotation", "--members=2"],
    "warp": ["--functions=sine", "--augment=offset", "--unroll=3"],
    "online": ["--synthetic=remember", "--unroll=2"],
    "warp, offline": ["--synthetic=sines", "--unroll=3", "--estimator=warpgrad_offline", "--start_objective=reptile"],
}


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("name", slow_but(["maml", "warp"], METHODS))
def test_shell_with_other_learners(name, tmp_path, capsys):
    model = tmp_path / "m.keras"
    size = ["--epochs=1", "--steps_per_epoch=2", "--query_size=10", f"--model={model}"]
    size += [] if name == "online" else ["--hidden=8"]
    assert cli.run(["meta-train", f"--method={name.split(',')[0]}", *METHODS[name], *size]) == 0
    assert f"wrote {model}" in capsys.readouterr().out
    assert keras.models.load_model(model).count_params() > 8
    again = [*METHODS[name], *size, f"--start={model}"]
    assert cli.run(["meta-train", f"--method={name.split(',')[0]}", *again, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--method=maml --functions=xor --model=m.h5", "--model must end with .keras"),
        ("--augment=noise", "--augment must be some of labels, classes"),
        ("--augment=rotation", "LabelRotation needs tasks of two values"),
        ("--synthetic=pose --functions=xor", "exclude each other"),
        ("--method=maml --rule=oja=weights", "--rule applies only with --method=blur"),
        ("--method=prototypes --functions=sine", "needs tasks of two classes or more"),
        ("--method=maml --functions=xor --start=/no/such.keras", "is not a Keras model"),
        ("--estimator=warpgrad --trajectory_loss_weight=1", "`trajectory_loss_weight` must be 0"),
        ("--rule=nonsense=1", "--rule must be option=value pairs"),
        ("--network=vgg", "--network must be some of mlp, lenet, resnet20 or .keras files. Received: vgg"),
        ("--method=warp --network=lenet", "--network applies only without --method=warp or online"),
        ("--method=maml --network=lenet,mlp", "--network must be one network with --method=maml"),
        ("--rule=keep_neurons=maybe", "keep_neurons cannot be 'maybe'"),
        ("--rule=whitening_rows=many", "whitening_rows cannot be 'many'"),
        ("--rule=oja=never", "`oja` must be one of"),
        ("--unroll=x", "--unroll must be positive whole numbers"),
        ("--unroll=2,3,4", "--epochs must be at least the number of stages"),
        ("--genome=/no/such/folder/g.json", "there is no folder"),
    ],
)
def test_shell_mistakes(capsys, argument, said):
    assert cli.run(["meta-train", "--epochs=2", *argument.split()]) == 2
    assert said in capsys.readouterr().err
