"""The training loop of both trainers: epochs, progress, callbacks, checkpoints and resumption.

Keras's own loop does not run under every strategy of TensorFlow, and outer loops have other data.
This loop keeps Keras's progress bar, callbacks and history. All state that affects later steps is
in variables, so a run that is killed and resumed from a checkpoint gives bit for bit the result of
an uninterrupted run.

Keras's `fit` does more around a step than apply an optimizer. Both trainers cover:

==========================  ====================================================================
Duty                        Here
==========================  ====================================================================
loss scaling                `loss_scale` before a loss is differentiated, `apply_scaled` after;
                            BilevelTrainer wraps its optimizers under mixed_float16, MetaTrainer
                            computes in float32
use_ema                     averages start at the weights and replace them at the end of `fit`
regularization, `add_loss`  added to the training loss of BilevelTrainer
steps_per_execution         batch callbacks run once per execution
run_eagerly                 steps run uncompiled
validation                  BilevelTrainer: arrays or datasets, sample weights, steps, frequency,
                            batch size; MetaTrainer: the callback `MetaValidate`
metrics                     BilevelTrainer: `metrics` and `weighted_metrics`, reset at the start of
                            an epoch
callbacks                   in the order of Keras; `on_train_end` gets the logs of the last epoch;
                            unsupported callbacks raise before training
stop_training               checked after each execution and each epoch
initial_epoch               from `fit`, a checkpoint or BackupAndRestore
verbose, history            `CallbackList` of Keras
debugging limits            `keras.config.max_epochs` and `keras.config.max_steps_per_epoch`
==========================  ====================================================================
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
from keras import ops

from keras_blur import arguments, files
from keras_blur.backend import Runner, apply_gradients, numbers_of, value_of
from keras_blur.files import check_output
from keras_blur.training import settings
from keras_blur.training.checkpoint import Checkpoint

Array = Any
_HEADROOM = 16.0


class Absent:
    """A method of `keras.Model` that a trainer does not have. Access raises an `AttributeError`.

    Args:
        instead: a sentence that names the alternative.
    """

    def __init__(self, instead: str):
        self.instead = instead

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} has no `{self.name}`: {self.instead}", name=self.name, obj=instance)


class OuterLoop(keras.Model):
    """A Keras model whose `fit` runs outer steps.

    To use a `tf.distribute` strategy, create it in the scope of the strategy.
    """

    jit_step: bool
    logged: tuple[str, ...]

    def __init__(self, name: str, dtype: Any = "float32"):
        super().__init__(name=name, dtype=dtype)
        self.runner = Runner()

    def build_optimizers(self) -> None:
        """Creates the variables of optimizers that are not built yet.

        Raises:
            ValueError: if two optimizers are the same object, or one was built for other variables.
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
        """Creates the progress counters and the running sums of the logged values."""
        self.meta_step = self.counter("meta_step", np.zeros((), "int32"))
        self.epoch, self.epoch_step = (self.counter(name, np.zeros((), "int32")) for name in ("epoch", "epoch_step"))
        self.logged = tuple(logged)
        self.sums = self.counter("sums", np.zeros((len(self.logged), 2), "float32"))  # of values and of weights

    def counter(self, name: str, value: np.ndarray) -> keras.Variable:
        """Creates a saved, non-trainable variable.

        All replicas write the same values to their copies.
        """
        made = self.add_weight(name=name, shape=value.shape, dtype=value.dtype.name, initializer="zeros", trainable=False)
        made.assign(value)
        return made

    @abc.abstractmethod
    def meta_train_step(self) -> dict[str, float]:
        """Runs one outer step; returns the running metrics."""

    @abc.abstractmethod
    def rewind(self) -> None:
        """Restarts the data streams at the position of the counters."""

    @property
    @abc.abstractmethod
    def learned(self) -> Any:
        """The learned object, with a `save(path)` method."""

    @property
    def sound(self) -> bool:
        """Whether the current result is usable. `SaveLearned` only writes sound results."""
        return True

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """All settings of the run except optimizers, by name, as input to `settings.described`."""

    @abc.abstractmethod
    def optimizers(self) -> dict[str, tuple[keras.optimizers.Optimizer, list[keras.Variable]]]:
        """The optimizers by attribute name, with the variables each one updates."""

    def validate(self, epoch: int, logs: dict[str, float], callbacks: keras.callbacks.CallbackList) -> dict[str, float]:
        """Adds validation logs to the logs of an epoch, if there is a validation."""
        del epoch, callbacks
        return logs

    def start_means(self) -> None:
        """Resets the running means at the start of an epoch."""
        self.sums.assign(ops.zeros_like(self.sums.value))

    def count_step(self, found: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
        """Advances the counters and updates the running means. Called inside a step.

        Args:
            found: values and weights for each name in `logged`.

        Returns:
            The running means. A mean with zero weight is NaN.
        """
        both = [(ops.sum(v * w), ops.sum(w)) for v, w in (found[name] for name in self.logged)]
        sums = value_of(self.sums) + ops.cast(ops.stack([ops.stack(pair) for pair in both]), "float32")
        self.sums.assign(sums)
        self.meta_step.assign(value_of(self.meta_step) + 1)
        self.epoch_step.assign(value_of(self.epoch_step) + 1)
        none = ops.equal(sums[:, 1], 0.0)
        means = ops.where(none, np.nan, sums[:, 0] / ops.where(none, 1.0, sums[:, 1]))
        return dict(zip(self.logged, ops.unstack(means), strict=True))

    def run_epochs(
        self,
        epochs: int,
        steps_per_epoch: int,
        checkpoint: str | os.PathLike[str] | None,
        callbacks: Sequence[keras.callbacks.Callback],
        verbose: int | str,
        initial_epoch: int = 0,
    ) -> keras.callbacks.History:
        """Runs the training loop. Arguments are those of `fit` of the trainers.

        Raises:
            ValueError: if the trainer is not compiled, an argument is invalid, a callback does not
                work with the trainer, or the checkpoint is damaged or has other settings.
            OSError: if the checkpoint cannot be read or written.
        """
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
                whole, first = divmod(int(numbers_of(self.epoch_step)), steps_per_epoch)  # resume the unfinished epoch
                done = int(numbers_of(self.epoch)) + whole
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
            for epoch in range(self._initial_epoch or done, epochs):  # BackupAndRestore sets `_initial_epoch`
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
        """Raises a `ValueError` for callbacks that do not work with this trainer."""
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
                if all(self.optimizer is not one for one, _ in self.optimizers().values()):
                    raise ValueError(
                        "`callbacks` must not set the learning rate of `optimizer` if it updates nothing: "
                        f"`start_optimizer` updates all outer parameters. Received: callbacks with {name}"
                    )
                schedule = getattr(plain(self.optimizer), "_learning_rate", None)
                if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
                    raise ValueError(
                        "`callbacks` must not set a learning rate that follows a schedule of the optimizer. Received: "
                        f"callbacks with {name}, learning_rate={type(schedule).__name__}"
                    )

    def _start_averages(self) -> None:
        """Initialises the averages of `use_ema` with the weights.

        A skipped first step then leaves them at the weights.
        """
        for optimizer, _ in self.optimizers().values():
            for own in parts(optimizer):
                if own.built and own.use_ema and not int(ops.convert_to_numpy(own.iterations)):
                    for average, variable in zip(own._model_variables_moving_average, own._trainable_variables, strict=True):
                        average.assign(variable.value)

    def _made_with(self, steps_per_epoch: int, callbacks: Sequence[keras.callbacks.Callback]) -> dict[str, Any]:
        """The settings of this run, split by what may change on resumption.

        Learning rates and curricula may change; all other settings must not.
        """
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
        """Restores a checkpoint of a run with the same settings.

        If a learning rate is kept, `now` gets the rate that the original run asked for.
        """
        try:
            with files.local(path) as copy:
                before = settings.read(copy)
                _check_same(path, before["settings"], now["settings"])
                self._load(copy, before["rates"], now["rates"])
        except _OtherSettings:
            raise
        except (ValueError, KeyError, UserWarning) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"Checkpoint {path!r} is damaged, or is not a trainer's checkpoint: {reason}") from error
        for name, (optimizer, _) in self.optimizers().items():
            asked, old = now["rates"][name], before["rates"][name]
            if asked == old:
                continue
            if isinstance(asked, float) and isinstance(old, float):
                if asked == float(numbers_of(optimizer.learning_rate)):  # unchanged since a callback set it
                    now["rates"][name] = old
                    continue
                optimizer.learning_rate = asked
            _warn(f"The learning rate of `{name}` is now {_named(asked)}; checkpoint {path!r} was made with {_named(old)}.")
        changed = list(settings.differences(before["curricula"], now["curricula"]))
        if changed:
            old, new = _sides(changed)
            _warn(f"The curriculum is now {new}; checkpoint {path!r} was made with {old}.")

    def _load(self, path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Loads all variables, even if a schedule replaces a constant rate or vice versa."""
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
            with warnings.catch_warnings():  # Keras only warns if it skips an optimizer's state
                warnings.filterwarnings("error", "Skipping variable loading", UserWarning)
                self.load_weights(path)
            for name, optimizer in kept.items():
                for variable, other in zip(_state(optimizer), _state(getattr(self, name)), strict=True):
                    variable.assign(other)
        finally:
            for name, optimizer in kept.items():
                setattr(self, name, optimizer)


class _OtherSettings(ValueError):
    """The checkpoint has other settings."""


def _check_same(path: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    found = list(settings.differences(before, now))
    found = [one for one in found if one[0] == "trainer"] or found  # with another trainer everything else differs too
    if found:
        old, new = _sides(found)
        raise _OtherSettings(f"`checkpoint` {path!r} was made with {old}; this run has {new}.")


def _sides(found: Sequence[tuple[str, str, str]]) -> tuple[str, str]:
    """All differences as text, before and now."""
    old, new = (", ".join(f"{one[0]}={one[place]}" for one in found) for place in (1, 2))
    return old, new


def _announce(path: str, done: int, first: int, epochs: int, steps: int, verbose: int | str) -> None:
    """Reports where a run resumes, or that it is complete.

    Warns if it has more epochs than asked for.
    """
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
    """The learning rate in an optimizer config, even a nested one; `None` if there are several."""
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
    """The variables of an optimizer except its learning rate."""
    rate = optimizer.learning_rate
    return [variable for variable in optimizer.variables if variable is not rate]


def _named(rate: Any) -> str:
    """Formats a learning rate for a message: a number, or a schedule with its parameters."""
    if isinstance(rate, float):
        return f"{rate:.6g}"
    config = rate.get("config", {}) if isinstance(rate, dict) else {}
    numbers = ", ".join(f"{name}={value}" for name, value in config.items() if value is not None and name != "name")
    return f"{rate['class_name']}({numbers})" if isinstance(rate, dict) and "class_name" in rate else str(rate)


def _forget_nan(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Resets callbacks whose best value is NaN, because no later value would be better."""
    for callback in callbacks:
        best = getattr(callback, "best", None)
        if isinstance(best, float | np.floating) and np.isnan(best):
            callback.best = None


def plain(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Unwraps a loss-scaling optimizer."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def parts(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """The optimizers that update weights: the parts of a `MultiOptimizer`, or the optimizer."""
    return list(getattr(plain(optimizer), "optimizers", [])) or [plain(optimizer)]


def clips(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether an optimizer clips gradients."""
    return any(own.clipnorm or own.clipvalue or own.global_clipnorm for own in parts(optimizer))


def loss_scale(optimizer: keras.optimizers.Optimizer) -> Array | None:
    """The loss scale before differentiation, a float32 scalar; `None` without loss scaling.

    A `LossScaleOptimizer` starts at 2^15, where a gradient of 2 overflows float16. Keras loses the
    first steps to this. The passes here use a sixteenth of the scale, and `apply_scaled` supplies
    the rest in float32. Gradients that fit into float16 at the full scale give the same step.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return ops.cast(optimizer.scale_loss(ops.ones(())), "float32") / _HEADROOM
    if optimizer.loss_scale_factor is None:
        return None
    return ops.cast(optimizer.scale_loss(ops.ones(())), "float32")


def apply_scaled(
    optimizer: keras.optimizers.Optimizer, gradients: Sequence[Array | None], variables: Sequence[keras.Variable]
) -> None:
    """Applies unscaled gradients with an optimizer that divides gradients by its loss scale.

    Args:
        optimizer: any Keras optimizer.
        gradients: gradients of the unscaled loss; `None` if the loss does not depend on a variable.
        variables: the variables, in the same order.
    """
    apply_gradients(optimizer, [None if g is None else optimizer.scale_loss(g) for g in gradients], variables)


def check_frequency(frequency: Any) -> None:
    """Raises a `ValueError` if `validation_freq` is neither a positive integer nor a list of
    them."""
    several = list(frequency) if isinstance(frequency, Sequence) and not isinstance(frequency, str) else [frequency]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in several):
        raise ValueError(
            f"`validation_freq` must be a positive integer or a list of them. Received: validation_freq={frequency!r}"
        )


def _limited(name: str, value: int, limit: int | None) -> int:
    """Caps a number of epochs or steps at the debugging limit of `keras.config`."""
    if not limit or value <= limit:
        return value
    warnings.warn(f"`{name}` is limited to {limit} by keras.config.", stacklevel=4)
    return limit


@contextlib.contextmanager
def _noticed(number: int, wanted: bool) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether the process received a signal.

    The default action of the signal is suppressed. Only the main thread can receive signals.
    """
    got: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(number, lambda received, _: got.append(received))
    try:
        yield lambda: bool(got)
    finally:
        signal.signal(number, before)
