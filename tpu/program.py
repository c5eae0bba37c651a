"""What each TPU core would run, cut out of a function that was traced under `TPUStrategy`.

The traced graph hands one computation to all cores. Its operations are copied into a function of
arrays: what comes from the host and what variables hold before the step goes in, what the
computation returns and what it writes to variables comes out. That function can be lowered by
TensorFlow's TPU kernels without a TPU, which one with variables cannot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Array = Any
ADDING = {"AssignAddVariableOp": "AddV2", "AssignSubVariableOp": "Sub"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A core's computation.

    Attributes:
        function: of the arguments; returns outputs, then what is written.
        arguments: values of each argument for every core, `[cores, ...]`.
        outputs: number of outputs.
        written: numbers of the variables that are written, in order.
        sums: cross-replica sums in it.
    """

    function: Any
    arguments: list[np.ndarray]
    outputs: int
    written: list[int]
    sums: int

    @property
    def specs(self) -> list[tf.TensorSpec]:
        """Shapes and dtypes of the arguments on one core."""
        return [tf.TensorSpec(value.shape[1:], value.dtype) for value in self.arguments]

    @property
    def traced(self) -> Any:
        """The function, traced for them."""
        return self.function.get_concrete_function(*self.specs)

    def lowered(self) -> bytes:
        """The computation as XLA gets it from TensorFlow's TPU kernels, a serialised
        HloModuleProto."""
        return self.function.experimental_get_compiler_ir(*self.specs)(stage="hlo_serialized", platform_name="TPU")


class _Values:
    """Values that the host feeds into a traced function."""

    def __init__(self, concrete: Any, given: Sequence[Any]):
        tensors = [leaf for leaf in tf.nest.flatten(list(given), expand_composites=True) if tf.is_tensor(leaf)]
        fed = [*tensors, *concrete.captured_inputs]
        self._fed = {placeholder.name: value for placeholder, value in zip(concrete.inputs, fed, strict=True)}

    def of(self, tensor: Any) -> list[Any]:
        """What each core gets, one value where all get the same."""
        if tensor.op.type == "TPUReplicatedInput":
            return [self._one(source) for source in tensor.op.inputs]
        return [self._one(tensor)]

    def _one(self, tensor: Any) -> Any:
        while tensor.op.type == "Identity":
            tensor = tensor.op.inputs[0]
        if tensor.op.type == "Const":
            return tf.make_ndarray(tensor.op.get_attr("value"))
        if tensor.name not in self._fed:
            raise ValueError(f"The host computes {tensor.name} ({tensor.op.type}) in the step: do that before it.")
        return self._fed[tensor.name]


def cut(concrete: Any, given: Sequence[Any], variables: Sequence[keras.Variable], cores: int) -> Program:
    """Cuts out a core's computation.

    Args:
        concrete: a concrete function, traced under `TPUStrategy`, that runs one computation.
        given: the values it was traced for.
        variables: all that it may read or write.
        cores: number of cores.

    Raises:
        ValueError: if a variable goes into a loop or a function inside the computation, or is not
            among those given.
    """
    graph = concrete.graph
    inside = [op for op in graph.get_operations() if _replicated(op) and op.type != "TPUReplicateMetadata"]
    names = {op.name for op in inside}
    host = _Values(concrete, given)
    handles = {id(handle): number for number, variable in enumerate(variables) for handle in _handles(variable)}
    made = tf.Graph().as_graph_def()
    made.library.CopyFrom(graph.as_graph_def().library)
    name_of: dict[str, str] = {}  # of a tensor in the old graph; in the new one
    variable_of: dict[str, int] = {}  # of a handle in the old graph
    now: dict[int, str] = {}  # a variable's present value in the new graph
    arguments: list[np.ndarray] = []
    placeholders: list[str] = []
    before: dict[int, str] = {}

    def argument(values: Sequence[Any]) -> str:
        arrays = [np.asarray(value) for value in values]
        arguments.append(np.stack(arrays if len(arrays) > 1 else arrays * cores))
        name = f"argument_{len(placeholders)}"  # no node of its own: the arguments of the function take its place
        placeholders.append(name + ":0")
        return name

    def from_host(tensor: Any) -> None:
        if tensor.dtype == tf.resource:
            found = {handles.get(id(handle), -1) for handle in host.of(tensor)}
            number = found.pop()
            if found or number < 0:
                raise ValueError(f"{tensor.name} is a variable that is not among those of the step.")
            variable_of[tensor.name] = number
            if number not in now:
                now[number] = before[number] = argument([variables[number].numpy()])
        else:
            name_of[tensor.name] = argument(host.of(tensor))

    for op in inside:
        for tensor in op.inputs:
            if tensor.op.name not in names and tensor.name not in name_of and tensor.name not in variable_of:
                from_host(tensor)
        number = next((variable_of[tensor.name] for tensor in op.inputs if tensor.name in variable_of), None)
        if number is None:
            node = made.node.add()
            node.CopyFrom(op.node_def)
            node.device = ""
            del node.input[:]
            node.input.extend(name_of[tensor.name] for tensor in op.inputs)
            for attribute in [one for one in node.attr if one.startswith("_")]:
                del node.attr[attribute]
            for place, tensor in enumerate(op.outputs):
                name_of[tensor.name] = f"{op.name}:{place}"
            continue
        if op.type == "Identity":
            variable_of[op.outputs[0].name] = number
        elif op.type == "ReadVariableOp":
            name_of[op.outputs[0].name] = now[number]
        elif op.type == "AssignVariableOp":
            now[number] = name_of[op.inputs[1].name]
        elif op.type in ADDING:
            node = made.node.add(op=ADDING[op.type], name=op.name, input=[now[number], name_of[op.inputs[1].name]])
            node.attr["T"].type = op.get_attr("dtype").as_datatype_enum
            now[number] = op.name
        else:
            raise ValueError(f"{op.type} {op.name} takes a variable, inside the computation: read it before that.")
    returned = [name_of[_replicated_output(tensor).inputs[0].name] for tensor in concrete.outputs]
    written = [number for number, name in now.items() if name != before[number]]
    wanted = [name if ":" in name else name + ":0" for name in [*returned, *(now[number] for number in written)]]
    specs = [tf.TensorSpec(value.shape[1:], value.dtype) for value in arguments]
    read = {name.partition(":")[0] for name in wanted}.union(*(node.input for node in made.node))  # some are only written

    @tf.function(jit_compile=True, autograph=False, input_signature=specs)
    def computation(*values: Array) -> list[Array]:
        fed = {name: value for name, value in zip(placeholders, values, strict=True) if name.partition(":")[0] in read}
        return tf.graph_util.import_graph_def(made, input_map=fed, return_elements=wanted, name="")

    sums = sum(op.type == "CrossReplicaSum" for op in inside)
    return Program(computation, arguments, len(returned), written, sums)


def _replicated(op: Any) -> bool:
    """Whether an operation is part of what the cores run."""
    return "_tpu_replicate" in op.node_def.attr


def _handles(variable: keras.Variable) -> list[Any]:
    """The handles by which a traced function may know a variable."""
    inner = variable.value
    packed = getattr(inner, "_packed_variable", None)
    copies = inner.values if isinstance(inner, tf.distribute.DistributedValues) else [inner]
    return [*([packed._handle] if packed is not None else []), *(copy.handle for copy in copies)]


def _replicated_output(tensor: Any) -> Any:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    if tensor.op.type != "TPUReplicatedOutput":
        raise ValueError(f"The step returns {tensor.name} ({tensor.op.type}), which the host computes.")
    return tensor.op
