"""Claims of README that take longer to check than a test may; `.ci/run` checks them."""

import keras
import numpy as np
import pytest

from keras_blur import genomes
from keras_blur.cli.fit import build_pair
from keras_blur.tasks.datasets import load_images


@pytest.mark.slow
def test_the_backprop_genome_is_as_good_as_sgd_on_the_digits():
    images = load_images()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    scores = []
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        model, twin = build_pair(images, genomes.backprop(0.1, "tanh", loss=loss), (256, 128))
        model.compile(loss=loss, metrics=["accuracy"])
        twin.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
        for learner in (model, twin):
            keras.utils.set_random_seed(seed)
            learner.fit(images.x_train, images.y_train, batch_size=32, epochs=10, verbose=0)
            scores.append(learner.evaluate(images.x_test, images.y_test, verbose=0)[1])
    ours, theirs = np.array(scores[::2]), np.array(scores[1::2])
    assert ours.min() > 0.95
    assert np.abs(ours - theirs).max() <= 0.003  # one test image of 360
