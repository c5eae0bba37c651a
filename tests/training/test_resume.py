"""A checkpoint knows the settings of its run: another one is named, another learning rate is used
and said."""

import functools
import json
import os
import resource

import keras
import numpy as np
import pytest
from marks import slow_but
from on_backend import JAX

from keras_blur import Genome, Rule, bilevel, cli, files, learners, meta, tasks
from keras_blur.training import loop, settings

SCHEDULE = keras.optimizers.schedules.ExponentialDecay
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def digits(**options):
    return tasks.images("digits", classes=range(3), size=4, **options)


def trainer(of=None, learner=None, estimator=None, optimizer=None, **options):
    made = meta.MetaTrainer(
        of or digits(),
        learner or learners.Blur((4,)),
        estimator or meta.Unroll(2),
        **{"batch_size": 8, "query_size": 8, **options},
    )
    if not isinstance(estimator, meta.Evolution):
        optimizer = optimizer or keras.optimizers.Adam(1e-2)
    made.compile(optimizer, run_eagerly=not JAX)  # a few steps are soon done; on JAX each eager one compiles
    return made


def network(units=6, activation="relu"):
    hidden = keras.layers.Dense(units, activation, kernel_initializer=keras.initializers.GlorotUniform(1))
    return keras.Sequential([keras.Input((5,)), hidden, keras.layers.Dense(3, kernel_initializer="ones")])


def data(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(24, 5)).astype("float32"), rng.integers(3, size=24)


def bilevel_trainer(model=None, meta_model=None, optimizer=None, meta_optimizer=None, loss=LOSS, metrics=None, **options):
    made = bilevel.BilevelTrainer(model or network(), meta_model or bilevel.SampleWeightNet(3), **options)
    made.compile(
        optimizer or keras.optimizers.SGD(0.1, momentum=0.9), meta_optimizer or keras.optimizers.Adam(1e-2), loss, metrics,
        run_eagerly=not JAX,
    )  # fmt: skip
    return made


def run(made, path, epochs, steps=2, *, seed=0, **options):
    """Two steps an epoch of either trainer."""
    if isinstance(made, meta.MetaTrainer):
        return made.fit(epochs, steps, checkpoint=path, **{"verbose": 0, **options})
    fits = {"batch_size": 8, "verbose": 0, **options}
    return made.fit(*data(seed), meta_data=data(1), epochs=epochs, steps_per_epoch=steps, checkpoint=path, **fits)


@pytest.fixture(scope="module")
def made_with(tmp_path_factory):
    """Checkpoints of one epoch."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {kind: folder / f"{kind.__name__}.weights.h5" for kind in (trainer, bilevel_trainer)}
    for kind, path in paths.items():
        run(kind(), path, 1)
    return paths


OTHER = {
    "seed": (lambda: trainer(seed=1), "seed=0", "seed=1"),
    "members": (lambda: trainer(members=2), "members=1", "members=2"),
    "tasks": (lambda: trainer(digits(relabel=True)), "tasks.relabel=False", "tasks.relabel=True"),
    "task data": (lambda: trainer(tasks.images("digits", classes=[3, 4, 5], size=4)), "tasks.data.projection=", "this run"),
    "more tasks": (lambda: trainer([digits(), digits()]), "tasks=[ArrayTasks]", "tasks=[ArrayTasks, ArrayTasks]"),
    "kind of tasks": (lambda: trainer(tasks.functions("xor")), "tasks=ArrayTasks", "tasks=FunctionTasks"),
    "rule": (
        lambda: trainer(learner=learners.Blur((4,), Rule(oja="weights"))),
        "learner.rule.oja='none'",
        "learner.rule.oja='weights'",
    ),
    "network": (lambda: trainer(learner=learners.Blur((5,))), "learner.network=4", "learner.network=5"),
    "learner": (lambda: trainer(learner=learners.Prototypes((4,))), "learner=Blur", "learner=Prototypes"),
    "steps": (lambda: trainer(estimator=meta.Unroll(3)), "estimator.steps=2", "estimator.steps=3"),
    "estimator": (lambda: trainer(estimator=meta.ES(2)), "estimator=Unroll", "estimator=ES"),
    "evolution": (lambda: trainer(estimator=meta.Evolution(2)), "optimizer=Adam", "optimizer=nothing"),
    "optimizer": (lambda: trainer(optimizer=keras.optimizers.SGD(1e-2)), "optimizer=Adam", "optimizer=SGD"),
    "moments": (
        lambda: trainer(optimizer=keras.optimizers.Adam(1e-2, beta_1=0.5)),
        "optimizer.beta_1=0.9",
        "optimizer.beta_1=0.5",
    ),
    "meta_batch_size": (lambda: trainer(meta_batch_size=2), "meta_batch_size=1", "meta_batch_size=2"),
    "batch_size": (lambda: trainer(batch_size=9), "batch_size=8", "batch_size=9"),
    "query_size": (lambda: trainer(query_size=9), "query_size=8", "query_size=9"),
    "clipnorm": (lambda: trainer(clipnorm=None), "clipnorm=10.0", "clipnorm=None"),
    "start": (lambda: trainer(start=Genome.random(Rule(), seed=7)), "start=None", "start={"),
    "outer model": (lambda: bilevel_trainer(network(7)), "model.layers[1].config.units=6", "model.layers[1].config.units=7"),
    "activation": (lambda: bilevel_trainer(network(activation="tanh")), "activation='relu'", "activation='tanh'"),
    "training loss": (
        lambda: bilevel_trainer(meta_model=bilevel.SampleWeightNet(4)),
        "meta_model.hidden=3",
        "meta_model.hidden=4",
    ),
    "other training loss": (
        lambda: bilevel_trainer(meta_model=bilevel.Hyperparameters(weight_decay=0.1)),
        "meta_model=SampleWeightNet",
        "meta_model=Hyperparameters",
    ),
    "hypergradient": (lambda: bilevel_trainer(estimator=bilevel.EvoGrad()), "estimator=OneStep", "estimator=EvoGrad"),
    "first": (lambda: bilevel_trainer(first="model"), "first='meta'", "first='model'"),
    "judge_training": (lambda: bilevel_trainer(judge_training=False), "judge_training=True", "judge_training=False"),
    "loss": (
        lambda: bilevel_trainer(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1)),
        "loss.ignore_class=None",
        "loss.ignore_class=1",
    ),
    "metrics": (lambda: bilevel_trainer(metrics=["accuracy"]), "metrics=None", 'metrics=["accuracy"]'),
    "meta_optimizer": (
        lambda: bilevel_trainer(meta_optimizer=keras.optimizers.RMSprop(1e-2)),
        "meta_optimizer=Adam",
        "meta_optimizer=RMSprop",
    ),
}


def kind_of(made):
    return trainer if isinstance(made, meta.MetaTrainer) else bilevel_trainer


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_is_named_before_any_work(name, made_with):
    make, old, new = OTHER[name]
    made = make()
    path = made_with[kind_of(made)]
    before, weights = path.read_bytes(), [np.array(one.value) for one in made.weights]
    with pytest.raises(ValueError, match="was made with ") as raised:
        run(made, path, 2)
    said = str(raised.value)
    first, second = said.split("; this run has ")
    assert old in first
    assert new in second or new in said
    assert said.count("\n") == 0
    assert said.endswith(".")
    assert path.read_bytes() == before
    for one, other in zip(made.weights, weights, strict=False):  # those of metrics are made by fit
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "old", "new"),
    [
        ({"steps": 3}, "steps_per_epoch=2", "steps_per_epoch=3"),
        ({"seed": 5}, "data.x.projection=", "data.x.projection="),
        ({"batch_size": 6}, "data.batch_size=8", "data.batch_size=6"),
        ({"meta_batch_size": 4}, "meta_data.batch_size=8", "meta_data.batch_size=4"),
        ({"meta_every": 2}, "meta_every=1", "meta_every=2"),
    ],
)
def test_another_argument_of_fit_is_named(options, old, new, made_with):
    with pytest.raises(ValueError, match=r"^`checkpoint` '.*' was made with ") as raised:
        run(bilevel_trainer(), made_with[bilevel_trainer], 2, **options)
    first, second = str(raised.value).split("; this run has ")
    assert old in first
    assert new in second


class Turned(tasks.Tasks):
    """Tasks of a user, with an option that is not public."""

    name, shape, outputs = "turned", (2,), 2

    def __init__(self, angle):
        self._angle = angle

    def available(self, split):
        return 100

    def examples(self, seed, count, split):
        return keras.ops.ones((count, 2)) * self._angle, keras.ops.ones((count, 1)) * np.array([1.0, -1.0], "float32")


def made_by(units):
    return lambda shape, outputs: [keras.layers.Flatten(), keras.layers.Dense(units), keras.layers.Dense(outputs)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda option: {"of": Turned(option / 2)}, ("tasks._angle", "2.0", "2.5")),
        (lambda option: {"learner": learners.Blur(made_by(option))}, ("networks[1].units", "4", "5")),
        (lambda option: {"learner": learners.Prototypes(made_by(option))}, ("networks[1].units", "4", "5")),
    ],
)
def test_what_is_not_public_is_compared_too(make, said):
    before, same, other = (settings.described(trainer(**make(option)).settings()) for option in (4, 4, 5))
    assert list(settings.differences(before, same)) == []
    assert list(settings.differences(before, other)) == [said]


def test_all_that_differs_is_in_one_sentence(made_with):
    path = made_with[trainer]
    with pytest.raises(ValueError, match="was made with") as raised:
        run(trainer(seed=1, batch_size=9), path, 2, steps=3)
    assert str(raised.value) == (
        f"`checkpoint` {str(path)!r} was made with batch_size=8, seed=0, steps_per_epoch=2; "
        "this run has batch_size=9, seed=1, steps_per_epoch=3."
    )


def test_a_checkpoint_of_the_other_trainer_is_said_to_be_one(made_with):
    for kind, other in ((trainer, bilevel_trainer), (bilevel_trainer, trainer)):
        names = [type(one()).__name__ for one in (other, kind)]
        sentence = f"was made with trainer={names[0]!r}; this run has trainer={names[1]!r}.$"
        with pytest.raises(ValueError, match=sentence):
            run(kind(), made_with[other], 2)


def flip(content):
    return content[:900] + bytes([content[900] ^ 1]) + content[901:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:10],
        lambda content: b"",
        lambda content: b"{}" * 500,
        flip,
    ],
)
def test_a_damaged_checkpoint_gives_one_sentence(damage, made_with, tmp_path):
    path = tmp_path / "run.weights.h5"
    path.write_bytes(damage(made_with[trainer].read_bytes()))
    with pytest.raises(ValueError, match="is damaged, or is not a trainer's checkpoint: it") as raised:
        run(trainer(), path, 2)
    assert "\n" not in str(raised.value)


def test_weights_of_a_model_are_no_checkpoint(tmp_path):
    path = tmp_path / "run.weights.h5"
    network().save_weights(path)
    with pytest.raises(
        ValueError, match="is damaged, or is not a trainer's checkpoint: it does not end as a checkpoint does"
    ):
        run(trainer(), path, 2)


def test_where_a_checkpoint_cannot_be_written_is_said_before_training(tmp_path):
    made = trainer()
    with pytest.raises(ValueError, match="`checkpoint` must be a file in a folder that exists; there is no folder"):
        run(made, tmp_path / "absent" / "run.weights.h5", 1)
    with pytest.raises(ValueError, match=r"`checkpoint` must end with \.weights\.h5"):
        run(made, tmp_path / "run.h5", 1)
    for name in ("absent/g.json", "."):
        for callback in (meta.SaveLearned(tmp_path / name), meta.MetaValidate(digits(), path=tmp_path / name)):
            with pytest.raises(ValueError, match="`path` must be a file"):
                made.fit(1, 1, callbacks=[callback], verbose=0)
    with pytest.raises(ValueError, match=r"must end with \.keras"):
        trainer(learner=learners.Prototypes((4,))).fit(1, 1, callbacks=[meta.SaveLearned(tmp_path / "m.json")], verbose=0)
    assert int(made.meta_step.value) == 0


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "run.weights.h5"
    run(trainer(), path, 1)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))

    try:
        with pytest.raises(OSError, match=r"File too large, and the old file stays as it was: '.*run\.weights\.h5'"):
            run(trainer(), path, 2, callbacks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.weights.h5"]


def rate_of(optimizer):
    return float(np.array(optimizer.learning_rate))


RATES = {
    "number": (1e-2, 1e-4, 1e-4, r"now 0\.0001; .* was made with 0\.01\."),
    "to a schedule": (1e-2, lambda: SCHEDULE(1e-4, 1, 0.5), 1e-4 / 2**4, r"now ExponentialDecay\(initial_.* with 0\.01\."),
    "from a schedule": (lambda: SCHEDULE(1e-2, 1, 0.5), 1e-4, 1e-4, r"now 0\.0001; .* with ExponentialDecay\("),
    "of a schedule": (
        lambda: SCHEDULE(1e-2, 1, 0.5),
        lambda: SCHEDULE(1e-2, 1, 0.1),
        1e-2 / 10**4,
        "decay_rate=0.1.*decay_rate=0.5",
    ),
}


@pytest.mark.parametrize("name", slow_but(["number"], RATES))
@pytest.mark.parametrize("kind", slow_but([bilevel_trainer], [trainer, bilevel_trainer]))
def test_another_learning_rate_is_used_and_said(name, kind, tmp_path):
    before, now, used, said = RATES[name]
    path, make = (
        tmp_path / "run.weights.h5",
        lambda rate: kind(optimizer=keras.optimizers.Adam(rate() if callable(rate) else rate)),
    )
    first, second = make(before), make(now)
    run(first, path, 1)
    with pytest.warns(UserWarning, match=f"The learning rate of `optimizer` is .*{said}") as warned:
        assert run(second, path, 2).epoch == [1]
    assert [one.category for one in warned].count(UserWarning) == 1
    assert rate_of(second.optimizer) == pytest.approx(used, rel=1e-5)
    assert int(second.optimizer.iterations) == 4  # the state went on
    third = make(now)
    run(third, path, 3)  # the new rate is now that of the run
    assert int(third.optimizer.iterations) == 6


@pytest.mark.slow
def test_the_state_goes_on_under_another_rate(tmp_path):
    """After a resume, steps are those of the old moments at the new rate, be it a number or a
    schedule."""
    path, unbroken = tmp_path / "run.weights.h5", trainer()
    run(trainer(), path, 1)
    content = path.read_bytes()
    run(unbroken, None, 1)
    unbroken.optimizer.learning_rate = 1e-3
    for _ in range(2):
        unbroken.meta_train_step()
    for rate in (1e-3, SCHEDULE(1e-3, 1, 1.0)):
        resumed = trainer(optimizer=keras.optimizers.Adam(rate))
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="The learning rate of `optimizer`"):
            run(resumed, path, 2)
        for one, other in zip(resumed.outer.values(), unbroken.outer.values(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_each_optimizer_has_a_rate_of_its_own(tmp_path):
    path = tmp_path / "run.weights.h5"
    run(bilevel_trainer(), path, 1)
    second = bilevel_trainer(meta_optimizer=keras.optimizers.Adam(1e-5))
    with pytest.warns(UserWarning, match=r"The learning rate of `meta_optimizer` is now 1e-05; .* with 0\.01"):
        run(second, path, 2)
    assert rate_of(second.meta_optimizer) == pytest.approx(1e-5)
    assert rate_of(second.optimizer) == pytest.approx(0.1)


class Reduce(keras.callbacks.Callback):
    """Lowers the rate after the first epoch, as ReduceLROnPlateau does."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.model.optimizer.learning_rate = 1e-3


@pytest.mark.slow
def test_the_rate_that_a_callback_set_goes_on(tmp_path):
    path = tmp_path / "run.weights.h5"
    unbroken, first, second = (trainer() for _ in range(3))
    run(unbroken, None, 4, callbacks=[Reduce()])
    run(first, path, 2, callbacks=[Reduce()])
    run(second, path, 3, callbacks=[Reduce()])  # another process
    run(second, path, 4, callbacks=[Reduce()])  # the same one, in which the rate is already low
    assert rate_of(second.optimizer) == pytest.approx(1e-3)
    for one, other in zip(second.weights, unbroken.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    third = trainer(optimizer=keras.optimizers.Adam(5e-2))
    with pytest.warns(UserWarning, match=r"now 0\.05; .* made with 0\.01"):
        run(third, path, 5)
    assert rate_of(third.optimizer) == pytest.approx(5e-2)


def test_a_resume_says_where_it_goes_on_and_when_nothing_is_left(tmp_path, capsys):
    path = tmp_path / "run.weights.h5"
    run(trainer(), path, 1, verbose=2)
    assert "checkpoint" not in capsys.readouterr().out
    run(trainer(), path, 2, verbose=2)
    assert f"Resuming from checkpoint {str(path)!r} at epoch 2 of 2.\n" in capsys.readouterr().out
    run(trainer(), path, 2, verbose=2)
    assert f"Nothing is left to do: checkpoint {str(path)!r} has all 2 epochs.\n" in capsys.readouterr().out
    run(trainer(), path, 2)
    assert capsys.readouterr().out == ""
    with pytest.warns(UserWarning, match=r"Nothing is left to do: checkpoint '.*' has 2 epochs, more than the epochs=1"):
        run(trainer(), path, 1)


def test_a_changed_curriculum_is_said(tmp_path):
    path = tmp_path / "run.weights.h5"
    run(trainer(), path, 1, callbacks=[meta.UnrollCurriculum([(0, 2), (1, 3)])])
    run(trainer(), path, 2, callbacks=[meta.UnrollCurriculum([(0, 2), (1, 3)])])
    with pytest.warns(
        UserWarning, match=r"is now UnrollCurriculum\.stages\[1\]\[1\]=4; .* with UnrollCurriculum\.stages\[1\]\[1\]=3\."
    ):
        run(trainer(), path, 3, callbacks=[meta.UnrollCurriculum([(0, 2), (1, 4)])])


@pytest.mark.usefixtures("eagerly")
def test_the_command_line_names_what_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--functions=xor --hidden=4 --members=1 --unroll=2 --epochs=1 --steps_per_epoch=2 --batch_size=8 --query_size=8"
    command = ["meta-train", *flags.split(), "--checkpoint=run.weights.h5"]
    assert cli.run(command) == 0
    before = (tmp_path / "genome.json").read_bytes()
    assert cli.run([*command, "--seed=1", "--members=2"]) == 2
    said = capsys.readouterr().err
    assert "was made with members=1, seed=0; this run has members=2, seed=1." in said
    assert (tmp_path / "genome.json").read_bytes() == before


def test_equal_settings_are_described_alike_in_another_place():
    """Automatic layer names, which count up in a process, and the order of a mapping make no
    difference."""
    keras.layers.Dense(2)
    one, other = (json.loads(json.dumps(settings.described(network()))) for _ in range(2))
    assert list(settings.differences(one, other)) == []
    x = np.linspace(-1.0, 1.0, 5000, dtype="float32").reshape(-1, 2)
    one, other = settings.described(x), settings.described(x * np.float32(1.0 + 1e-7))
    assert list(settings.differences(one, other)) == []
    y = np.arange(60000) % 10
    changed = y.copy()
    changed[31234] += 1
    found = list(settings.differences(settings.described({"y": y}), settings.described({"y": changed})))
    assert [name for name, *_ in found] == ["y.projection"]


def test_numbers_of_another_size_are_other_settings():
    x = np.linspace(-1.0, 1.0, 50, dtype="float32")
    found = list(settings.differences(settings.described(x), settings.described(3.0 * x)))
    assert [name for name, *_ in found] == ["euclidean_norm"]
    gates = [{"synapse_update": np.float32(value)} for value in (-0.1, -0.2)]
    one, other = (json.loads(json.dumps(settings.described(learners.Blur((4,), fixed=gate)))) for gate in gates)
    assert [name for name, *_ in settings.differences(one, other)] == ["fixed.synapse_update.euclidean_norm"]
    assert list(settings.differences(one, one)) == []


@pytest.mark.parametrize("change", [lambda of: of, lambda of: tasks.augment(of, tasks.LabelPermutation())])
def test_other_data_of_few_shot_tasks_are_other_settings(change, tmp_path):
    def of(seed):
        return change(tasks.classes(2, 4, pool=4, features=4, seed=seed))

    path = tmp_path / "run.weights.h5"
    run(trainer(of(0)), path, 1)
    with pytest.raises(ValueError, match=r"^`checkpoint` '.*' was made with tasks\.(tasks\.)?data\.projection="):
        run(trainer(of(1)), path, 2)
    run(trainer(of(0)), path, 2)


def test_the_rate_of_an_optimizer_is_found_where_it_is():
    wrapped = settings.described(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.25)))
    assert loop._rate(wrapped) == 0.25
    assert "0.25" not in json.dumps(loop._without_rate(wrapped))
    assert loop._rate({"class": "Several", "optimizers": []}) is None


def test_any_value_has_a_description():
    class Own:
        def __init__(self):
            self.units, self._cache, self.itself = 3, np.zeros(2), self

    values = [
        Own(),
        functools.partial(max, 1),
        np.float32,
        {"a", "b"},
        np.array(["a"]),
        float("nan"),
        print,
        object(),
        range(2),
    ]
    for value in values:
        assert json.dumps(settings.described(value))
    assert settings.described(Own()) == {"class": "Own", "units": 3, "itself": "Own"}
    nan = settings.described(np.array([np.nan]))
    assert list(settings.differences(nan, nan)) == []


def test_a_checkpoint_there_and_back(tmp_path):
    path, memory = str(tmp_path / "a.weights.h5"), files.Memory("a.weights.h5")
    network().save_weights(memory)
    settings.write(path, memory, {"seed": 1, "name": "ä"})
    assert settings.read(path) == {"seed": 1, "name": "ä"}
    network().load_weights(path)  # Keras reads the weights as ever
