"""What `keras.ops` cannot express, once for TensorFlow and once for JAX.

Files of the package that run on both backends take these functions from here. The two
implementations have the same functions:

- `value_of`, `numbers_of`: a Keras variable as an array of a program, and of numpy;
- `leaves`, `pack`, `tree_map`: trees of arrays, including registered classes;
- `compiled`: a function of trees, compiled once for each combination of shapes; `loop`: steps as
  one loop of a program; `one_by_one`: a function applied at each place of an axis, also as one
  loop; `recomputed`: a function that stores little for its gradient; `stored`: a value that is
  costly to compute again, which it can store;
- `gradient`: the gradient of a function of a tree; `vjp`, `jvp`: the transposed Jacobian and the
  Jacobian of a function at a point; `pullback`: the transposed Jacobian of some results with
  respect to some arguments;
- `gradient_for_keras`, `dense`: gradients as Keras's optimizers get them, and as arrays;
  `apply_gradients`: an optimizer's step;
- `branch`: one of several functions, chosen when a program runs; `on_platform`: one of two equal
  functions, chosen by the device that is to run it; `by_operation`: whether what is traced runs
  operation by operation, not as a program of XLA;
- `tanh`, `mean`: in float64 as well. On JAX several functions of `keras.ops` round float64 to
  float32, whether or not JAX has 64 bits enabled: `mean`, `var`, `average`, `norm`, `tanh`, `sin`
  and all others whose type comes from Keras's `result_type`, which knows 64 bits on TensorFlow
  alone. `core` uses none of them;
- `matmul`: a product that no accelerator computes with less precision than its type has;
- `mixed`: linear combinations of states, in the form that compiles best;
- `solve_positive`: a system of equations by Cholesky's factorisation, with no check of its numbers;
- `register`: makes a class a tree of arrays for the backend's transformations;
- `Runner`: runs programs that read and assign variables, on all devices; `on_devices`: a number of
  devices for the runners made in a scope; `replicas`, `replicas_of_program`, `replica`, `total`:
  how many devices share a batch, which of them this is, and sums over them;
- `bits`, `bits_of_rows`: random integers from a seed, equal on both backends; `upper_product`: of
  integers, where 64 bits would overflow;
- `stream`, `constant`: draws of numbers in order as data, and an array that they read; `on_cpu`:
  where they are drawn; `passes`, `repeated`: endless batches of arrays and of datasets;
- `check_constants`: that programs follow the numbers of a model's genome; `training_elsewhere`:
  whether a gradient tape of another model is recording;
- `reducible`, `symbolic_build`, `remember_logits`, `with_logits`, `outside_of_programs`, `after`,
  `is_dataset`: what Keras's trainers of the two backends ask of a model in different ways.
"""

import importlib
from types import ModuleType

import keras


def _part(name: str) -> ModuleType:
    return importlib.import_module(f"keras_blur.backend.with_{keras.backend.backend()}.{name}")


_trees = _part("trees")
leaves = _trees.leaves
numbers_of = _trees.numbers_of
pack = _trees.pack
register = _trees.register
tree_map = _trees.tree_map
value_of = _trees.value_of

_programs = _part("programs")
branch = _programs.branch
compiled = _programs.compiled
loop = _programs.loop
one_by_one = _programs.one_by_one

_derivatives = _part("derivatives")
dense = _derivatives.dense
gradient = _derivatives.gradient
gradient_for_keras = _derivatives.gradient_for_keras
jvp = _derivatives.jvp
pullback = _derivatives.pullback
recomputed = _derivatives.recomputed
stored = _derivatives.stored
vjp = _derivatives.vjp

_numbers = _part("numbers")
bits = _numbers.bits
bits_of_rows = _numbers.bits_of_rows
matmul = _numbers.matmul
mean = _numbers.mean
mixed = _numbers.mixed
solve_positive = _numbers.solve_positive
tanh = _numbers.tanh
upper_product = _numbers.upper_product

_devices = _part("devices")
by_operation = _devices.by_operation
on_devices = _devices.on_devices
on_platform = _devices.on_platform
replica = _devices.replica
replicas = _devices.replicas
replicas_of_program = _devices.replicas_of_program
Runner = _devices.Runner
total = _devices.total

_streams = _part("streams")
constant = _streams.constant
is_dataset = _streams.is_dataset
on_cpu = _streams.on_cpu
passes = _streams.passes
repeated = _streams.repeated
stream = _streams.stream

_trainers = _part("trainers")
after = _trainers.after
apply_gradients = _trainers.apply_gradients
check_constants = _trainers.check_constants
outside_of_programs = _trainers.outside_of_programs
reducible = _trainers.reducible
remember_logits = _trainers.remember_logits
symbolic_build = _trainers.symbolic_build
training_elsewhere = _trainers.training_elsewhere
with_logits = _trainers.with_logits
