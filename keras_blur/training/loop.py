"""The training loop that both trainers share: epochs, progress, callbacks, checkpoints, and resuming after a kill.

Keras's own loop does not run under every strategy, and an outer loop has other data. This one keeps Keras's progress bar,
callbacks and history. All state that later steps depend on is in variables, so a run that is killed and resumed from a
checkpoint ends bit for bit as the unbroken run does.

Keras's `fit` does more around a step than apply an optimizer. Both trainers take over:

==========================  ==================================================================================
Duty                        Here
==========================  ==================================================================================
loss scaling                `loss_scale` before a loss is differentiated, `apply_scaled` after; BilevelTrainer
                            wraps its optimizers under mixed_float16, MetaTrainer computes in float32
use_ema                     averages start at the weights and replace them at the end of `fit`
regularization, `add_loss`  added to the training loss of BilevelTrainer
steps_per_execution         batch callbacks run once per execution
run_eagerly                 steps run without `tf.function`
validation                  BilevelTrainer: arrays or datasets, sample weights, steps, frequency, batch size;
                            MetaTrainer: the callback `MetaValidate`
metrics                     BilevelTrainer: `metrics` and `weighted_metrics`, reset at the start of an epoch
callbacks                   the order of Keras; `on_train_end` gets the logs of the last epoch; a callback that
                            cannot work is refused before training
stop_training               checked after each execution and each epoch
initial_epoch               of `fit`, of a checkpoint, of BackupAndRestore
verbose, history            `CallbackList` of Keras
debugging limits            `keras.config.max_epochs` and `keras.config.max_steps_per_epoch`
==========================  ==================================================================================
"""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import arguments, files
from keras_blur.distribution import Runner
from keras_blur.files import check_output
from keras_blur.training import settings
from keras_blur.training.checkpoint import Checkpoint

Array = Any
_HEADROOM = 16.0


class OuterLoop(keras.Model):
    """A Keras model whose `fit` is a loop of outer steps; made in the scope of a `tf.distribute` strategy, under it."""

    jit_step: bool
    logged: tuple[str, ...]

    def __init__(self, name: str, dtype: Any = "float32"):
        super().__init__(name=name, dtype=dtype)
        self.runner = Runner()

    def build_optimizers(self) -> None:
        """Makes the variables of the optimizers that are not built yet.

        Raises:
            ValueError: if one optimizer is given twice, or was built for other variables.
        """
        found = list(self.optimizers().values())
        if len({id(plain(optimizer)) for optimizer, _ in found}) < len(found):
            raise ValueError("The optimizers of a trainer must be different objects. Received: the same one twice.")
        for optimizer, variables in found:
            known = {id(variable) for variable in plain(optimizer)._trainable_variables} if optimizer.built else set()
            if optimizer.built and known != {id(variable) for variable in variables}:
                raise ValueError(
                    "An optimizer must be new, or have been compiled for the same weights before. Received: "
                    f"{optimizer.name}, which was built for others"
                )
        with self.runner.scope():
            for optimizer, variables in found:
                if not optimizer.built:
                    optimizer.build(variables)

    def make_counters(self, logged: Sequence[str]) -> None:
        """Makes the variables that say how far training is, and those of the running means that are logged."""
        self.meta_step = self.counter("meta_step", np.zeros((), "int32"))
        self.epoch, self.epoch_step = (self.counter(name, np.zeros((), "int32")) for name in ("epoch", "epoch_step"))
        self.logged = tuple(logged)
        self.sums = self.counter("sums", np.zeros((len(self.logged), 2), "float32"))  # of values and of weights

    def counter(self, name: str, value: np.ndarray) -> keras.Variable:
        """A variable that is saved and not trained; each replica writes its own copy, all the same."""
        made = self.add_weight(name=name, shape=value.shape, dtype=value.dtype.name, initializer="zeros", trainable=False)
        made.assign(value)
        return made

    @abc.abstractmethod
    def meta_train_step(self) -> dict[str, float]:
        """One outer step; returns the running metrics."""

    @abc.abstractmethod
    def rewind(self) -> None:
        """Makes the streams of data start where the counters stand."""

    @property
    @abc.abstractmethod
    def learned(self) -> Any:
        """What was learned, as something that has `save(path)`."""

    @property
    def sound(self) -> bool:
        """Whether what was learned so far is of use: `SaveLearned` writes no other."""
        return True

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the run depends on, by name, as `settings.described` takes it; optimizers excepted."""

    @abc.abstractmethod
    def optimizers(self) -> dict[str, tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        """The optimizers by the attribute that holds them, with the variables that each changes."""

    def validate(self, epoch: int, logs: dict[str, float], callbacks: keras.callbacks.CallbackList) -> dict[str, float]:
        """The logs of an epoch, with those of a validation if there is one."""
        del epoch, callbacks
        return logs

    def start_means(self) -> None:
        """Begins the running means of an epoch."""
        self.sums.assign(tf.zeros_like(self.sums.value))

    def count_step(self, found: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
        """Inside a step: moves the counters on and gives the running means.

        Args:
            found: by the names in `logged`, values and their weights, whose weighted sums are kept.

        Returns:
            The means; that of nothing is NaN.
        """
        both = [(tf.reduce_sum(v * w), tf.reduce_sum(w)) for v, w in (found[name] for name in self.logged)]
        sums = self.sums.value + tf.cast(tf.stack(both), tf.float32)
        self.sums.assign(sums)
        self.meta_step.assign(self.meta_step + 1)
        self.epoch_step.assign(self.epoch_step + 1)
        none = tf.equal(sums[:, 1], 0.0)
        means = tf.where(none, np.nan, sums[:, 0] / tf.where(none, 1.0, sums[:, 1]))
        return dict(zip(self.logged, tf.unstack(means), strict=True))

    def run_epochs(
        self,
        epochs: int,
        steps_per_epoch: int,
        checkpoint: str | os.PathLike[str] | None,
        callbacks: Sequence[keras.callbacks.Callback],
        verbose: int | str,
        initial_epoch: int = 0,
    ) -> keras.callbacks.History:
        """The loop; arguments as `fit` of a trainer gives them."""
        if not self.compiled:
            raise ValueError("The trainer must be compiled first: call `compile(optimizer=...)`.")
        arguments.count("steps_per_epoch", steps_per_epoch)
        arguments.integer("epochs", epochs, 0)
        arguments.integer("initial_epoch", initial_epoch, 0)
        self._check_callbacks(callbacks)
        epochs = _limited("epochs", epochs, keras.config.max_epochs())
        steps_per_epoch = _limited("steps_per_epoch", steps_per_epoch, keras.config.max_steps_per_epoch())
        saving = None
        done, first = initial_epoch, 0
        if checkpoint is not None:
            check_output("checkpoint", checkpoint, (".weights.h5",))
            path = os.fspath(checkpoint)
            now = self._made_with(steps_per_epoch, callbacks)
            if files.exists(path):
                self._restore(path, now)
                whole, first = divmod(int(self.epoch_step.numpy()), steps_per_epoch)  # on with the epoch that was left
                done = int(self.epoch.numpy()) + whole
                _announce(path, done, first, epochs, steps_per_epoch, verbose if self.runner.writes_files else 0)
            saving = Checkpoint(path, now)
        followed = keras.callbacks.CallbackList(
            [*callbacks, *([saving] if saving else [])], add_history=True, add_progbar=verbose != 0, model=self,
            verbose=1 if verbose == "auto" else verbose, epochs=epochs, steps=steps_per_epoch,
        )  # fmt: skip
        self.stop_training = False
        followed.on_train_begin()
        self.rewind()  # BackupAndRestore may have moved the counters
        self._start_averages()
        logs: dict[str, float] = {}
        epoch_logs: dict[str, float] = {}
        with _noticed(signal.SIGTERM, saving is not None and not self.runner.several_workers) as terminated:
            for epoch in range(self._initial_epoch or done, epochs):  # Keras's BackupAndRestore sets the former
                if not first:
                    self.epoch.assign(epoch)
                    self.epoch_step.assign(0)
                    self.start_means()
                followed.on_epoch_begin(epoch)
                for begin in range(first, steps_per_epoch, self.steps_per_execution):
                    followed.on_train_batch_begin(begin)
                    end = min(begin + self.steps_per_execution, steps_per_epoch)
                    for _ in range(begin, end):
                        logs = self.meta_train_step()
                    followed.on_train_batch_end(begin + self.steps_per_execution - 1, logs)
                    if self.stop_training or terminated():
                        break
                first = 0
                if saving and terminated() and end < steps_per_epoch:
                    saving.write()
                else:
                    if verbose and logs.get("skipped") == 1.0:
                        print(f"\nEpoch {epoch + 1} skipped all of its outer steps: no loss and gradient was finite.")
                    epoch_logs = self.validate(epoch, dict(logs), followed)
                    followed.on_epoch_end(epoch, epoch_logs)
                    _forget_nan(callbacks)
                if self.stop_training or terminated():
                    break
        if not terminated():
            for optimizer, variables in self.optimizers().values():
                optimizer.finalize_variable_values(variables)
        followed.on_train_end(epoch_logs)
        if terminated():
            raise SystemExit(128 + signal.SIGTERM)
        return self.history

    def _check_callbacks(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Raises a `ValueError` for a callback that this trainer cannot serve."""
        for callback in callbacks:
            name = type(callback).__name__
            if isinstance(callback, keras.callbacks.ModelCheckpoint) and not callback.save_weights_only:
                raise ValueError(
                    "`callbacks` must have ModelCheckpoint with save_weights_only=True, as a trainer cannot be loaded as a "
                    f"model. Received: save_weights_only={callback.save_weights_only!r}"
                )
            if isinstance(callback, keras.callbacks.LearningRateScheduler | keras.callbacks.ReduceLROnPlateau):
                if not hasattr(self.optimizer, "learning_rate"):
                    raise ValueError(
                        "`callbacks` must not set a learning rate where the optimizer has none. Received: "
                        f"callbacks with {name}"
                    )
                schedule = getattr(plain(self.optimizer), "_learning_rate", None)
                if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
                    raise ValueError(
                        "`callbacks` must not set a learning rate that follows a schedule of the optimizer. Received: "
                        f"callbacks with {name}, learning_rate={type(schedule).__name__}"
                    )

    def _start_averages(self) -> None:
        """Lets the averages of `use_ema` start at the weights, so that a skipped first step leaves them there."""
        for optimizer, _ in self.optimizers().values():
            for own in parts(optimizer):
                if own.built and own.use_ema and not int(own.iterations.numpy()):
                    for average, variable in zip(own._model_variables_moving_average, own._trainable_variables, strict=True):
                        average.assign(variable.value)

    def _made_with(self, steps_per_epoch: int, callbacks: Sequence[keras.callbacks.Callback]) -> dict[str, Any]:
        """The settings of this run: those that must not change, and learning rates and curricula, which may."""
        optimizers = {name: settings.described(one) for name, (one, _) in self.optimizers().items()}
        rates = {name: _rate(one) for name, one in optimizers.items()}
        fixed = {
            "trainer": type(self).__name__,
            **settings.described(self.settings()),
            **{name: one if rates[name] is None else _without_rate(one) for name, one in optimizers.items()},
            "steps_per_epoch": steps_per_epoch,
            "precision": self.dtype_policy.name,
        }
        curricula = {type(one).__name__: one.get_config() for one in callbacks if hasattr(one, "get_config")}
        return {"settings": fixed, "rates": rates, "curricula": settings.described(curricula)}

    def _restore(self, path: str, now: dict[str, Any]) -> None:
        """Reads a checkpoint of a run like this one; in `now`, a rate that is kept becomes the one first asked for."""
        try:
            with files.local(path) as copy:
                before = settings.read(copy)
                _check_same(path, before["settings"], now["settings"])
                self._load(copy, before["rates"], now["rates"])
        except _OtherSettings:
            raise
        except (ValueError, KeyError, UserWarning) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"Checkpoint {path!r} is damaged, or none of a trainer: {reason}") from error
        for name, (optimizer, _) in self.optimizers().items():
            asked, old = now["rates"][name], before["rates"][name]
            if asked == old:
                continue
            if isinstance(asked, float) and isinstance(old, float):
                if asked == float(optimizer.learning_rate.numpy()):  # as a callback had left it
                    now["rates"][name] = old
                    continue
                optimizer.learning_rate = asked
            _warn(f"The learning rate of `{name}` is now {_named(asked)}; checkpoint {path!r} was made with {_named(old)}.")
        changed = list(settings.differences(before["curricula"], now["curricula"]))
        if changed:
            old, new = _sides(changed)
            _warn(f"The curriculum is now {new}; checkpoint {path!r} was made with {old}.")

    def _load(self, path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Loads all variables, also where a number takes the place of a schedule or a schedule that of a number."""
        kept: dict[str, keras.optimizers.Optimizer] = {}
        for name, (optimizer, variables) in self.optimizers().items():
            if isinstance(before[name], float) != isinstance(now[name], float):
                schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 1.0)
                rate = 1.0 if isinstance(before[name], float) else keras.optimizers.schedules.serialize(schedule)
                with self.runner.scope():
                    like = type(optimizer).from_config(_with_rate(optimizer.get_config(), rate))
                    like.build(variables)
                kept[name] = optimizer
                setattr(self, name, like)
        try:
            with warnings.catch_warnings():  # Keras only warns of an optimizer whose state it leaves out
                warnings.filterwarnings("error", "Skipping variable loading", UserWarning)
                self.load_weights(path)
            for name, optimizer in kept.items():
                for variable, other in zip(_state(optimizer), _state(getattr(self, name)), strict=True):
                    variable.assign(other)
        finally:
            for name, optimizer in kept.items():
                setattr(self, name, optimizer)


class _OtherSettings(ValueError):
    """A checkpoint was made with other settings."""


def _check_same(path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    found = list(settings.differences(before, now))
    found = [one for one in found if one[0] == "trainer"] or found  # of another trainer all else differs too
    if found:
        old, new = _sides(found)
        raise _OtherSettings(f"`checkpoint` {path!r} was made with {old}; this run has {new}.")


def _sides(found: Sequence[tuple[str, str, str]]) -> tuple[str, str]:
    """All that differs, before and now, as text."""
    old, new = (", ".join(f"{one[0]}={one[place]}" for one in found) for place in (1, 2))
    return old, new


def _announce(path: str, done: int, first: int, epochs: int, steps: int, verbose: int | str) -> None:
    """Says where a run goes on, or that nothing is left to do; fewer epochs than there are is never passed over."""
    if done > epochs:
        _warn(f"Nothing is left to do: checkpoint {path!r} has {done} epochs, more than the epochs={epochs} asked for.")
    elif verbose and done == epochs:
        print(f"Nothing is left to do: checkpoint {path!r} has all {epochs} epochs.")
    elif verbose:
        step = f", step {first + 1} of {steps}" if first else ""
        print(f"Resuming from checkpoint {path!r} at epoch {done + 1} of {epochs}{step}.")


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _rate(config: dict[str, Any]) -> Any:
    """The learning rate in the description of an optimizer, or of one that it wraps; `None` if it has several."""
    if "learning_rate" in config or "inner_optimizer" not in config:
        return config.get("learning_rate")
    return _rate(config["inner_optimizer"]["config"])


def _without_rate(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: _without_rate(value) for name, value in config.items() if name != "learning_rate"}


def _with_rate(config: Any, rate: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: rate if name == "learning_rate" else _with_rate(value, rate) for name, value in config.items()}


def _state(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables of an optimizer but its learning rate."""
    rate = optimizer.learning_rate
    return [variable for variable in optimizer.variables if variable is not rate]


def _named(rate: Any) -> str:
    """A learning rate in a sentence: a number, or a schedule with its numbers."""
    if isinstance(rate, float):
        return f"{rate:.6g}"
    config = rate.get("config", {}) if isinstance(rate, dict) else {}
    numbers = ", ".join(f"{name}={value}" for name, value in config.items() if value is not None and name != "name")
    return f"{rate['class_name']}({numbers})" if isinstance(rate, dict) and "class_name" in rate else str(rate)


def _forget_nan(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Takes a NaN that counts as the best value so far from Keras's callbacks: no later value is better than NaN."""
    for callback in callbacks:
        best = getattr(callback, "best", None)
        if isinstance(best, float | np.floating) and np.isnan(best):
            callback.best = None


def plain(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """An optimizer without the loss scaling around it."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def parts(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """The optimizers that update weights: several of a `MultiOptimizer`, one of any other."""
    return list(getattr(plain(optimizer), "optimizers", [])) or [plain(optimizer)]


def clips(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an optimizer clips gradients."""
    return any(own.clipnorm or own.clipvalue or own.global_clipnorm for own in parts(optimizer))


def loss_scale(optimizer: keras.optimizers.Optimizer) -> Array | None:
    """The factor of a loss before it is differentiated, a float32 scalar; `None` without loss scaling.

    A `LossScaleOptimizer` starts at 2^15. There a gradient of 2 overflows float16, and Keras loses the first steps to it. So
    the passes use a sixteenth of that, and `apply_scaled` supplies the rest in float32. A gradient that float16 can hold at
    the full scale gives the same step.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tf.cast(optimizer.scale_loss(tf.ones(())), tf.float32) / _HEADROOM
    if optimizer.loss_scale_factor is None:
        return None
    return tf.cast(optimizer.scale_loss(tf.ones(())), tf.float32)


def apply_scaled(
    optimizer: keras.optimizers.Optimizer, gradients: Sequence[Array | None], variables: Sequence[keras.Variable]
) -> None:
    """Applies true gradients with an optimizer that divides what it gets by its loss scale.

    Args:
        optimizer: any Keras optimizer.
        gradients: derivatives of the loss that is not scaled; `None` where the loss does not depend on a variable.
        variables: the variables, in the same order.
    """
    optimizer.apply([None if g is None else optimizer.scale_loss(g) for g in gradients], list(variables))


def check_frequency(frequency: Any) -> None:
    """Raises a `ValueError` if `validation_freq` is neither a positive integer nor a list of them."""
    several = list(frequency) if isinstance(frequency, Sequence) and not isinstance(frequency, str) else [frequency]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in several):
        raise ValueError(
            f"`validation_freq` must be a positive integer or a list of them. Received: validation_freq={frequency!r}"
        )


def _limited(name: str, value: int, limit: int | None) -> int:
    """A number of epochs or steps within the debugging limit of `keras.config`."""
    if not limit or value <= limit:
        return value
    warnings.warn(f"`{name}` is limited to {limit} by keras.config.", stacklevel=4)
    return limit


@contextlib.contextmanager
def _noticed(number: int, wanted: bool) -> Iterator[Callable[[], bool]]:
    """Whether this process got a signal, which then does nothing else; only the main thread can look out for one."""
    got: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(number, lambda received, _: got.append(received))
    try:
        yield lambda: bool(got)
    finally:
        signal.signal(number, before)
