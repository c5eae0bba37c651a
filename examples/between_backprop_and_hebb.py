"""
Title: Between backpropagation and Hebbian learning
Description: Start from the genome that is backpropagation, and remove its properties one by one.
Source: "Meta-Learning Bidirectional Update Rules" (ICML 2021), sections 3.1, 3.2 and appendix C.7.

    python examples/between_backprop_and_hebb.py [--quick] [--seeds 5] [--seed 0] [--plot FILE.png]
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from absl import app, flags

import keras_blur as kb
from keras_blur.report import style
from keras_blur.tasks.datasets import load_images

_QUICK = flags.DEFINE_boolean("quick", False, "Two seeds and three epochs.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of each rule.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "The first seed.", lower_bound=0)
_PLOT = flags.DEFINE_string("plot", None, "File for the picture.")

"""
## The rule

Every neuron has two states. The forward sweep leaves the value s(z) and the derivative s'(z); the
backward sweep multiplies the second by what comes back from above; the synapse between two neurons
changes by the product of the lower one's first state and the upper one's second. With one kernel
for both directions that is backpropagation to the last bit. Nature has no such kernel: the feedback
path has other synapses. What is lost when they are separate?
"""

loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
backprop = kb.genomes.backprop(learning_rate=0.1, activation="tanh", loss=loss)


def variant(**options):
    """The same numbers under a rule with other options."""
    return backprop.with_rule(backprop.rule.replace(**options))


genomes = {
    "backpropagation": backprop,
    "separate feedback path, same updates": variant(directions="tied_updates"),
    "separate feedback path, own updates": variant(directions="untied"),
    "labels in place of the error": variant(
        feedback="labels", loss=None, batch_reduction="mean", last_activation="tanh"
    ).replace(synapse_update=np.float32(0.01)),
}

"""
The second has a backward kernel that starts at random and receives the forward kernel's changes:
the two grow alike. The third applies the rule to the backward kernel with the roles of the two
neurons exchanged. The fourth never sees an error, only the labels as +1 and -1, and climbs: it
follows the gradient of a score that is linear in the output, which nothing tells to stop, and does
not learn at any rate. Meta-learning has to find transforms with which labels alone suffice.

## The experiment
"""


def train(genome, images, seed, epochs):
    """Test accuracy after each epoch."""
    keras.utils.set_random_seed(seed)
    layers = [keras.Input(images.x_train.shape[1:]), keras.layers.Rescaling(1 / images.scale), keras.layers.Flatten()]
    layers += [kb.layers.Dense(128), kb.layers.Dense(64), kb.layers.Dense(images.classes)]
    model = kb.Sequential(layers, genome=genome)
    model.compile(loss=loss, metrics=["accuracy"])
    test = (images.x_test, images.y_test)
    history = model.fit(images.x_train, images.y_train, batch_size=32, epochs=epochs, validation_data=test, verbose=0)
    return history.history["val_accuracy"]


def main(argv):
    """Trains each rule with several seeds, prints the accuracies, and draws them."""
    del argv
    count, epochs = (2, 3) if _QUICK.value else (_SEEDS.value, 10)
    seeds = range(_SEED.value, _SEED.value + count)
    images = load_images("digits")
    curves = {name: np.array([train(genome, images, seed, epochs) for seed in seeds]) for name, genome in genomes.items()}
    print(f"test accuracy on the 8x8 digits after {epochs} epochs, mean and deviation, seeds {seeds[0]} to {seeds[-1]}")
    for name, values in curves.items():
        print(f"{name:<34} {values[:, -1].mean():.3f} +- {values[:, -1].std(ddof=1):.3f}")
    if _PLOT.value:
        figure, axes = style.figure(width=6.0, height=3.6)
        for index, (name, values) in enumerate(curves.items()):
            spread = values.std(axis=0, ddof=1)
            style.line(axes[0][0], index, np.arange(1, epochs + 1), values.mean(axis=0), name, spread)
        axes[0][0].set_xlabel("epoch")
        axes[0][0].set_ylabel("test accuracy")
        axes[0][0].legend(fontsize=8)
        style.save(figure, _PLOT.value)


"""
## What to try next

Change `mu` so that the backward sweep mixes the states, or let `nu_tilde` add a Hebbian product of
the values themselves (`backprop.replace(...)`); each is a point of the space that meta-learning
searches.
"""

if __name__ == "__main__":
    app.run(main)
