"""Detects labels that are probably correct from early training losses, without clean data.

Source: "Faster Meta Update Strategy for Noise-Robust Deep Learning" (Xu et al., CVPR 2021), section
3.3, after "DivideMix" (Li et al., ICLR 2020). A network learns common patterns before it memorises
wrong labels. Early in training, the losses of correct and wrong labels therefore form two
components. A mixture of two normal distributions is fitted, and an example counts as clean if it
belongs to the lower component with a probability above one half. The mixture is scikit-learn's.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_blur import arguments, backend
from keras_blur.checks import checked_arrays, model_expects
from keras_blur.core.losses import as_keras, check_weighable, mask_of, per_example
from keras_blur.tasks.datasets import needs

_ROUNDING = 1e-6  # losses that differ by no more than this, of their size, are the same in float32


@dataclasses.dataclass(frozen=True)
class PseudoCleanSplit:
    """Splits examples by loss into probably correct and other labels.

    Train a model as usual for a few epochs, split, and pass the clean part as `meta_data` to
    `BilevelTrainer.fit`. This is not a clean data set: mistakes of the network are included.

    Args:
        threshold: probability of the lower component above which an example counts as clean.
        seed: random seed of the mixture's initialisation.

    Raises:
        ValueError: if the threshold is not between 0 and 1.

    Example:

    >>> losses = np.array([0.1, 0.2, 0.15, 3.0, 2.8])
    >>> (PseudoCleanSplit().probabilities(losses) > 0.5).tolist()
    [True, True, True, False, False]
    """

    threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        arguments.between("threshold", self.threshold, 0.0, 1.0)
        arguments.integer("seed", self.seed, 0)

    def probabilities(self, losses: np.ndarray) -> np.ndarray:
        """The probability of each example that its label is correct.

        Args:
            losses: `[n]`.

        Returns:
            Probabilities `[n]` of the mixture component with the lower mean.

        Raises:
            ValueError: if losses are not finite or are all equal.
            ImportError: if scikit-learn is not installed; the message has the install command.
        """
        losses = np.asarray(losses, "float64")
        sound = losses.ndim == 1 and losses.size > 0 and np.all(np.isfinite(losses))
        if not sound or np.ptp(losses) <= _ROUNDING * np.max(np.abs(losses)):
            raise ValueError(f"`losses` must be finite numbers [n], not all the same. Received: {losses!r}")
        scaled = ((losses - losses.min()) / np.ptp(losses))[:, None]
        mixture = needs("sklearn.mixture", "scikit-learn").GaussianMixture(
            2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=self.seed
        )
        # Ten iterations are the source's; they need not converge, of which scikit-learn would warn.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", needs("sklearn.exceptions", "scikit-learn").ConvergenceWarning)
            mixture.fit(scaled)
        return mixture.predict_proba(scaled)[:, int(np.argmin(mixture.means_))]

    def split(self, model: keras.Model, x: np.ndarray, y: np.ndarray, loss: Any, batch_size: int = 512) -> np.ndarray:
        """Selects the examples whose labels are probably correct.

        Args:
            model: a model after a few epochs of training.
            x, y: inputs `[n, ...]`, and labels in the format of the loss, some of them wrong.
            loss: a Keras loss, its name, or a function of labels and predictions.
            batch_size: examples per batch.

        Returns:
            Booleans `[n]`.

        Raises:
            ValueError: if the data do not fit the model or the loss, a loss is not finite, or all
                losses are equal.
        """
        loss = as_keras(loss)
        x, y, _ = checked_arrays(x, y, None, model_expects(model, loss))

        def predict(values: list[Any], batch: Any) -> tuple[Any, ...]:
            with keras.StatelessScope(list(zip(model.variables, values, strict=True))):
                prediction = model(batch, training=False)
            mask = mask_of(prediction)
            return (prediction,) if mask is None else (prediction, mask)

        predict = backend.compiled(predict, jit_compile=False)
        values = [backend.value_of(variable) for variable in model.variables]
        batches = (ops.convert_to_tensor(x[start : start + batch_size]) for start in range(0, len(x), batch_size))
        parts = zip(*(predict(values, batch) for batch in batches), strict=True)
        losses = _losses(loss, y, *(ops.concatenate(part) for part in parts))
        check_weighable(losses)
        return self.probabilities(ops.convert_to_numpy(losses)) > self.threshold


def _losses(loss: keras.losses.Loss, y: np.ndarray, prediction: Any, mask: Any = None) -> Any:
    """The loss of each example, under the mask of the model's layers."""
    if mask is not None:
        prediction._keras_mask = mask
    return per_example(loss, y, prediction)
