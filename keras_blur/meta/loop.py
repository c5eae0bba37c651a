"""The loop over outer steps that trainers share: epochs, progress, callbacks, checkpoints, and the way back after a kill.

The loop of Keras cannot run under every strategy, and its data are not the data of an outer loop. This one keeps what Keras
gives (progress bar, callbacks, history) and adds that everything which decides what comes next is a variable: so that a run
which is killed and started again from a checkpoint gives, bit for bit, what the unbroken run gives.
"""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_blur import files
from keras_blur.distribution import Runner
from keras_blur.meta.callbacks import Checkpoint

Array = Any


class OuterLoop(keras.Model):
    """A Keras model whose `fit` is a loop of outer steps; made in the scope of a `tf.distribute` strategy, under it."""

    jit_step: bool
    logged: tuple[str, ...]

    def __init__(self, name: str):
        super().__init__(name=name)
        self.runner = Runner()

    def make_counters(self, logged: Sequence[str]) -> None:
        """Makes the variables that say how far training is, and those of the running means that are logged."""
        self.meta_step = self.counter("meta_step", np.zeros((), "int32"))
        self.epoch, self.epoch_step, self.epoch_length = (
            self.counter(name, np.zeros((), "int32")) for name in ("epoch", "epoch_step", "epoch_length")
        )
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

    def validate(self, logs: dict[str, float]) -> dict[str, float]:
        """The logs of an epoch, with those of a validation if there is one."""
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
    ) -> keras.callbacks.History:
        """The loop; arguments as `fit` of a trainer gives them."""
        if not self.compiled:
            raise ValueError("The trainer must be compiled first: call `compile(optimizer=...)`.")
        saving = None
        if checkpoint is not None:
            path = os.fspath(checkpoint)
            if not path.endswith(".weights.h5"):
                raise ValueError(f"`checkpoint` must end with .weights.h5. Received: checkpoint={path!r}")
            saving = Checkpoint(path)
        done = first = 0
        if saving and files.exists(path):
            self._restore(path)
            before = int(self.epoch_length.numpy())
            if before != steps_per_epoch:
                raise ValueError(f"`steps_per_epoch` must be what it was before, {before}. Received: {steps_per_epoch}")
            whole, first = divmod(int(self.epoch_step.numpy()), steps_per_epoch)  # on with the epoch that was left
            done = int(self.epoch.numpy()) + whole
        self.epoch_length.assign(steps_per_epoch)
        self.rewind()
        followed = keras.callbacks.CallbackList(
            [*callbacks, *([saving] if saving else [])], add_history=True, add_progbar=verbose != 0, model=self,
            verbose=1 if verbose == "auto" else verbose, epochs=epochs, steps=steps_per_epoch,
        )  # fmt: skip
        self.stop_training = False
        followed.on_train_begin()
        logs: dict[str, float] = {}
        with _noticed(signal.SIGTERM, saving is not None and not self.runner.several_workers) as terminated:
            for epoch in range(self._initial_epoch or done, epochs):  # Keras's BackupAndRestore sets the former
                if not first:
                    self.epoch.assign(epoch)
                    self.epoch_step.assign(0)
                    self.start_means()
                followed.on_epoch_begin(epoch)
                for step in range(first, steps_per_epoch):
                    followed.on_train_batch_begin(step)
                    logs = self.meta_train_step()
                    followed.on_train_batch_end(step, logs)
                    if self.stop_training or terminated():
                        break
                first = 0
                if saving and terminated() and step + 1 < steps_per_epoch:
                    saving.write()
                else:
                    if verbose and logs.get("skipped") == 1.0:
                        print(f"\nEpoch {epoch + 1} skipped all of its outer steps: no loss and gradient was finite.")
                    followed.on_epoch_end(epoch, self.validate(logs))
                    _forget_nan(callbacks)
                if self.stop_training or terminated():
                    break
        followed.on_train_end(logs)
        if terminated():
            raise SystemExit(128 + signal.SIGTERM)
        return self.history

    def _restore(self, path: str) -> None:
        try:
            with files.local(path) as copy:
                self.load_weights(copy)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"Checkpoint {path!r} does not fit this trainer, or is damaged: {error}") from error


def _forget_nan(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Takes a NaN that counts as the best value so far from Keras's callbacks: no later value is better than NaN."""
    for callback in callbacks:
        best = getattr(callback, "best", None)
        if isinstance(best, float | np.floating) and np.isnan(best):
            callback.best = None


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
