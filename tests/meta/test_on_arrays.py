"""Meta-training on the user's own arrays."""

import keras
import numpy as np
import pytest

from keras_blur import learners, meta, tasks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 5))
Y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 1)


@pytest.mark.parametrize("kind", ["classes", "values"])
def test_meta_training_on_arrays(kind):
    own = tasks.arrays(X, Y if kind == "classes" else X[:, :1] - X[:, 1:2], kind=kind)
    loss = "cross_entropy" if kind == "classes" else "squared"
    learner = learners.MAML(keras.optimizers.SGD(0.1), (8,), loss=loss)
    trainer = meta.MetaTrainer(own, learner, meta.Unroll(steps=1), batch_size=8, query_size=8)
    trainer.compile(keras.optimizers.Adam(1e-2), jit_compile=False)
    losses = trainer.fit(epochs=4, steps_per_epoch=10, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
