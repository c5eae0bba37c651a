"""What `keras.ops` cannot say, once for TensorFlow and once for JAX.

Every other file of the package that runs on both backends asks this one. The two implementations
have the same functions:

- `vjp`, `jvp`: the transposed Jacobian and the Jacobian of a function at a point;
- `tanh`: in float64 as well;
- `register`: makes a class a tree of arrays for the backend's transformations;
- `traced`: whether a value's numbers are unknown because a program is being traced;
- `replicas`, `replica`, `total`: how many devices share a batch, which one this is, and sums over them;
- `bits`, `fold_in`: random integers from a seed, equal on both backends;
- `training_elsewhere`: whether a gradient tape of another model records;
- `reducible`, `symbolic_build`, `outside_of_programs`, `after`, `is_dataset`: what Keras's trainers of
  the two backends ask of a model in different ways.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_blur.backend.with_tensorflow import (
        after,
        bits,
        fold_in,
        is_dataset,
        jvp,
        outside_of_programs,
        reducible,
        register,
        replica,
        replicas,
        symbolic_build,
        tanh,
        total,
        traced,
        training_elsewhere,
        vjp,
    )
else:
    from keras_blur.backend.with_jax import (
        after,
        bits,
        fold_in,
        is_dataset,
        jvp,
        outside_of_programs,
        reducible,
        register,
        replica,
        replicas,
        symbolic_build,
        tanh,
        total,
        traced,
        training_elsewhere,
        vjp,
    )

__all__ = [
    "after",
    "bits",
    "fold_in",
    "is_dataset",
    "jvp",
    "outside_of_programs",
    "reducible",
    "register",
    "replica",
    "replicas",
    "symbolic_build",
    "tanh",
    "total",
    "traced",
    "training_elsewhere",
    "vjp",
]
