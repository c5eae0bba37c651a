"""
Title: A genome for convolutions
Description: The numbers of the genome `fast`, meta-trained on small convolutional networks.
Source: "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021), section 4.4, for
CMA-ES on a genome.

    python examples/convolutional_genome.py [--quick] [--data_dir DIR] [--generations 60]
        [--population 10] [--steps 64] [--seed 0] [--genome FILE.json] [--checkpoint FILE]
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from absl import app, flags

import keras_blur as kb

_QUICK = flags.DEFINE_boolean("quick", False, "Small numbers everywhere, and the 8x8 digits.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared sets, with mnist and omniglot.")
_GENERATIONS = flags.DEFINE_integer("generations", 60, "Generations in all, a multiple of 10.", lower_bound=10)
_POPULATION = flags.DEFINE_integer("population", 10, "Candidates of a generation.", lower_bound=4)
_STEPS = flags.DEFINE_integer("steps", 64, "Learning steps of an episode.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the search.", lower_bound=0)
_GENOME = flags.DEFINE_string("genome", None, "File for the genome.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "File (.weights.h5) that the search goes on from.")

"""
## What is learned

`fast` is backpropagation with whitened, orthogonalised terms. Its transforms stay as they are. The
size of a change, how it falls with the steps, the damping of the whitening and the breadth of the
average that predicts are learned.
"""

LEARNED = ("synapse_update", "decay_power", "log_decay_steps", "log_damping", "log_averaging")

"""
## Networks and tasks

Two small networks, and images of 10x10 to 20x20: MNIST with permuted classes, and ten characters of
Omniglot. Each generation has one network and one task. A candidate's fitness is its accuracy on the
query, averaged over the steps 1, 2, 4, ... So early steps count as much as late ones.
"""


def convolutional(kernel, filters, hidden=()):
    """A function of a learner: convolutions with pooling, hidden dense layers, and the outputs."""

    def network(shape, outputs):
        layers = []
        for count in filters:
            layers += [keras.layers.Conv2D(count, kernel, padding="same", activation="relu"), keras.layers.MaxPooling2D(2)]
        dense = [keras.layers.Dense(units, activation="relu") for units in hidden]
        return [*layers, keras.layers.Flatten(), *dense, keras.layers.Dense(outputs)]

    return network


NETWORKS = (convolutional(5, (6, 12), hidden=(48,)), convolutional(3, (8, 16)))


def families(quick):
    """The task distributions; those of Omniglot have classes that MNIST does not have."""
    if quick:
        return [kb.tasks.images("digits", relabel=True)]
    digits = [kb.tasks.images("mnist", size=size, relabel=True, data_dir=_DATA_DIR.value) for size in (10, 20)]
    return [*digits, kb.tasks.episodes("omniglot", ways=10, shots=12, size=14, data_dir=_DATA_DIR.value)]


def printed(genome):
    return ", ".join(f"{name} {float(genome.arrays[name]):.3f}" for name in LEARNED)


def main(argv):
    del argv
    quick = _QUICK.value
    each = 1 if quick else 10  # generations between two reports
    if _GENERATIONS.value % each:
        raise app.UsageError(f"--generations must be a multiple of {each}. Received: --generations={_GENERATIONS.value}")
    start = kb.genomes.load("fast")
    fixed = {name: value for name, value in start.arrays.items() if name not in LEARNED}
    trainer = kb.meta.MetaTrainer(
        families(quick),
        [kb.learners.Blur(network, start.rule, fixed=fixed) for network in NETWORKS],
        kb.meta.Evolution(4 if quick else _STEPS.value, population=_POPULATION.value, sigma=0.15, fitness="speed"),
        batch_size=32 if quick else 64,
        query_size=80,
        start=start,
        seed=_SEED.value,
    )
    trainer.compile()
    print(f"start: {printed(start)}", flush=True)

    def report(epoch, logs):
        print(f"generation {each * (epoch + 1)}: accuracy {logs['accuracy']:.3f}, sigma {logs['sigma']:.3f}; "
              f"{printed(trainer.genome)}", flush=True)  # fmt: skip

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=report)]
    if _GENOME.value:
        callbacks.append(kb.meta.SaveLearned(_GENOME.value))
    epochs = 2 if quick else _GENERATIONS.value // each
    trainer.fit(epochs, each, checkpoint=_CHECKPOINT.value, callbacks=callbacks, verbose=0)


if __name__ == "__main__":
    app.run(main)
