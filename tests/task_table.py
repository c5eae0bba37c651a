"""All task distributions, and their episodes in files: `python tests/task_table.py FILE.npz` writes
what the backend of KERAS_BACKEND draws."""

import sys

import numpy as np
from task_harness import arrays, take

from keras_blur import backend, random, tasks
from keras_blur.tasks.functions import function_names

SHAPE = {"steps": 3, "batch": 8, "query": 12}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 5))
Y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 1)

# Distributions computed with integers, comparisons and exact products: equal to the bit.
EXACT = {
    **{f"function {name}": lambda name=name: tasks.functions(name) for name in function_names()},
    "functions": lambda: tasks.functions(["xor", "circle", "cross"], relabel=True),
    "images": lambda: tasks.images("digits", relabel=True),
    "small images": lambda: tasks.images("digits", crop=6, size=3, classes=[7, 2, 4], permute=True),
    "arrays": lambda: tasks.arrays(X, Y),
    "values": lambda: tasks.arrays(X, X[:, :2], kind="values"),
    "episodes": lambda: tasks.episodes("digits", ways=3, shots=4),
    "fixed episodes": lambda: tasks.episodes("digits", ways=3, shots=4, exclusive=False),
    "classes": lambda: tasks.classes(shots=3),
    "remember": tasks.remember,
    "permuted labels": lambda: tasks.augment(tasks.images("digits"), tasks.LabelPermutation()),
    "any classes": lambda: tasks.augment(tasks.classes(exclusive=False), tasks.ClassResample()),
}
# Inputs and values of the others have sines, cosines, projections, or sums of products, which a
# compiler may fuse: equal but for rounding, relative to the largest number. Their labels are equal.
TOLERANCE = 3e-7
ROUNDED = {
    **{name: EXACT.pop(name) for name in list(EXACT) if name.endswith(("moons", "sine")) or "blobs" in name},
    "noise": lambda: tasks.functions(["xor", "circle", "blobs2"], noise=0.1),
    "projected images": lambda: tasks.images("digits", project=12),
    "sines": tasks.sines,
    "pose": tasks.pose,
    "offset": lambda: tasks.augment(tasks.sines(), tasks.LabelOffset(0.0, 10.0, modulo=10.0)),
    "rotation": lambda: tasks.augment(tasks.pose(), tasks.LabelRotation()),
}
MIXED = tasks.mixture({tasks.functions("xor"): 1, tasks.functions("circle"): 2})


def drawn():
    """Two episodes of each distribution and five of a stream of a mixture, as arrays by name."""
    made = {name: make() for name, make in {**EXACT, **ROUNDED}.items()}
    draw = backend.compiled(
        lambda seed: {name: of.episode(seed, **SHAPE) for name, of in made.items()}, jit_compile=False
    )  # fmt: skip
    episodes = {"mixture": take(MIXED.dataset(3, **SHAPE), 5)}
    for number in (1, -7):
        for name, episode in draw(random.seed_of(number)).items():
            episodes.setdefault(name, []).append(arrays(episode))
    return {f"{name}/{part}": np.stack([one[part] for one in some]) for name, some in episodes.items() for part in some[0]}


if __name__ == "__main__":
    np.savez(sys.argv[1], **drawn())
