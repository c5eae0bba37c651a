"""A second opinion: one learning step in plain float64 numpy, as clumsy and as close to the paper
as it can be.

Written from equations 5, 6 and 7 of "Meta-Learning Bidirectional Update Rules" (Sandler et al.,
ICML 2021, sections 3.2 to 3.4, appendices B and C.6), not from the library. No work is saved here:
every neuron has all k states, the input too; every synapse has all k channels in both directions,
those of the first layer too; the bias is a unit that is always 1.

Values are `[batch, *features, state]`. Every connection is a dense one on rows `[unit, state]`: a
table says which neurons each position reads, and a dense layer has one position. Synapses are
`[from, to, channel]`; the last row (in the feedback path, the last column) is the bias. Synapses
that a connection lacks, such as those between the groups of a convolution, are zero and stay zero.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np

FUNCTIONS = {
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "relu_tanh": (lambda z: np.maximum(np.tanh(z), 0), lambda z: (z > 0) * (1 - np.tanh(z) ** 2)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "linear": (lambda z: z, np.ones_like),
}


@dataclasses.dataclass
class Layer:
    """Neurons and the synapses that end in them. By default a dense layer.

    Attributes:
        source: number of the value that it reads: first the inputs, then the operations in order.
        units: number of units at each position.
        synapses: number of its set of synapses; layers may share one.
        window: size of a convolution's window; its padding is "same".
        stride: stride of that window.
        groups: number of groups; the units of a group read only that group's input channels.
        own: whether unit j reads input j only, as a scale does.
        activation: its nonlinearity, or None for the rule's.
    """

    source: int
    units: int
    synapses: int
    window: tuple = ()
    stride: int = 1
    groups: int = 1
    own: bool = False
    activation: str | None = None


@dataclasses.dataclass
class Map:
    """A map without synapses, by its name in `MAPS`."""

    name: str
    sources: tuple


def step(
    genome, synapses, inputs, labels, *,
    graph=None, time=0, neurons=None, weights=None, loss_slope=None, activations=None,
):  # fmt: skip
    """One learning step.

    Args:
        genome: a Genome without population axes.
        synapses: a dict of arrays `[channel, ..., out]` for each set, as the library holds them.
        inputs: `[batch, *features]`; a tuple of them if there are several.
        labels: `[batch, classes]`, what state 2 of the output receives; or what `loss_slope` takes.
        graph: a Layer or Map for each operation, the output last; None for a chain of dense layers.
        time: the learning step, from 0.
        neurons: what the step before returned, if the rule keeps neurons.
        weights: weight of each example in the Hebbian term.
        loss_slope: for feedback="error": maps prediction and labels to the derivative of the loss.
        activations: nonlinearity of each layer of a chain, or None for the rule's.

    Returns:
        New synapses (as given), neurons (`[state, batch, *features]` of the inputs and of each
        layer), and the prediction before learning.
    """
    rule = genome.rule
    inputs = [np.asarray(one, np.float64) for one in (inputs if isinstance(inputs, tuple) else (inputs,))]
    examples = len(inputs[0])
    if graph is None:
        names = activations or [None] * len(synapses)
        graph = [
            Layer(layer, own["kernel"].shape[-1], layer, activation=name)
            for layer, (own, name) in enumerate(zip(synapses, names, strict=True))
        ]
    operations = dict(enumerate(graph, len(inputs)))  # by the number of the value
    layers = {number: one for number, one in operations.items() if isinstance(one, Layer)}
    output = max(operations)
    genes = [layer_genome(genome, holder) for holder in range(len(synapses))]
    has_bias = ["bias" in own for own in synapses]

    # 0. Which neurons each layer reads, and which synapses there are.
    shapes, tables = [one.shape[1:] for one in inputs], {}
    places = [None] * len(synapses)
    for number, one in operations.items():
        if isinstance(one, Layer):
            tables[number], shape = reads(one, shapes[one.source])
            places[one.synapses] = stored_places(one, tables[number].shape[1])
        else:
            shape = MAPS[one.name].value(*(np.zeros((1, *shapes[source])) for source in one.sources)).shape[1:]
        shapes.append(shape)

    # 1. Neurons start at zero, or where they were; the input's state 1 is the example.
    nodes = [*range(len(inputs)), *layers]
    a = {number: np.zeros((examples, *shapes[number], rule.states)) for number in nodes}
    if rule.keep_neurons and neurons is not None:
        a = {number: np.moveaxis(np.array(old, np.float64), 0, -1) for number, old in zip(nodes, neurons, strict=True)}
    for number, one in enumerate(inputs):
        a[number] = np.zeros((*one.shape, rule.states))
        a[number][..., 0] = one

    # 2. Synapses, normalised where they are stored.
    ways = [unpack(rule, untraced(own), where) for own, where in zip(synapses, places, strict=True)]
    traces = [None] * len(synapses)
    if rule.momentum != "none":
        traces = [unpack(rule, traced(own), where) for own, where in zip(synapses, places, strict=True)]
    if rule.normalize_synapses in ("stored", "both"):
        ways = [unit_norm(rule, gene, *way) for gene, way in zip(genes, ways, strict=True)]

    def read(values, number):
        """What the rows of a layer read, the bias unit too."""
        one = layers[number]
        return with_bias(patches(values[one.source], tables[number]), has_bias[one.synapses])

    count = examples if weights is None else np.sum(np.abs(weights))

    def learn(ways, traces, values, below, prefix):
        """Equation 7 for each set of synapses: the terms of all its layers, then the change."""
        sums = [None] * len(ways)
        for number, one in layers.items():
            pre, post = read(below, number), rows(values[number], one)
            own = synapses[one.synapses]
            users = sum(other.synapses == one.synapses for other in layers.values())
            rows_of_group = None  # of a dense layer with synapses of its own
            if rule.whitening and not one.window and not one.own and users == 1:
                rows_of_group = rule.whitening_rows
            gene, where = genes[one.synapses], places[one.synapses]
            term = terms(rule, gene, prefix, pre, post, own, where, examples, weights, rows_of_group)
            known = sums[one.synapses]
            sums[one.synapses] = term if known is None else [old + new for old, new in zip(known, term, strict=True)]
        done = [
            update(
                rule,
                genes[holder],
                prefix,
                ways[holder],
                traces[holder],
                sums[holder],
                synapses[holder],
                places[holder],
                time,
                count,
            )
            for holder in range(len(ways))
        ]
        return [way for way, _ in done], [trace for _, trace in done]

    # 3. Forward, equation 5. State 1 goes through a map, the others through its Jacobian there.
    for number, one in operations.items():
        if isinstance(one, Map):
            a[number] = through(one, [a[source] for source in one.sources])
            continue
        gene = genes[one.synapses]
        name = one.activation or (rule.forward_activation if leads_on(operations, number) else rule.last_activation)
        there, _ = effective(rule, gene, *ways[one.synapses])
        a[number] = forward(rule, gene, name, read(a, number), there, rows(a[number], one)).reshape(a[number].shape)
    left_by_forward = {number: states.copy() for number, states in a.items()}
    last = genes[layers[output].synapses]
    prediction = a[output][..., 0] / last.temperature

    # 4. Synapses may change before any feedback.
    if rule.forward_synapse_update:
        prefix = "forward_" if rule.separate_forward_synapse else ""
        ways, _ = learn(ways, traces, a, left_by_forward, prefix)

    if time % rule.supervised_every == 0:
        # 5. Feedback into state 2 of the output.
        given = labels
        if rule.feedback == "error":
            given = loss_slope(prediction, labels) / last.temperature
            if rule.derivative_state:
                given = given * a[output][..., 1]
        a[output][..., 2:] = 0
        a[output][..., 1] = given

        # 6. Backward, equation 6. What comes back goes through the transposed Jacobian of a map, at
        # state 1 of the forward pass. What comes back from several readers is summed.
        came = {number: np.zeros_like(states) for number, states in a.items()}
        for number, one in reversed(operations.items()):
            if isinstance(one, Map):
                points = [left_by_forward[source][..., 0] for source in one.sources]
                for c in range(rule.states):
                    backs = MAPS[one.name].back(came[number][..., c], *points)
                    for source, back in zip(one.sources, backs, strict=True):
                        came[source][..., c] += back
                continue
            if number != output:
                gene = genes[reader(operations, number)]
                new = backward(rule, gene, rows(a[number], one), rows(came[number], one))
                a[number] = new.reshape(a[number].shape)
            gene = genes[one.synapses]
            there, back = ways[one.synapses]
            _, back = effective(rule, gene, there, feedback_path(rule, there, back))
            table = tables[number]
            z = sent(rule, gene, rows(a[number], one), back[:, : table.shape[1]])
            came[one.source] += unpatched(z, table, came[one.source].shape)

        # 7. Synapses, equation 7. The new states go through the maps again.
        for number, one in operations.items():
            if isinstance(one, Map):
                a[number] = through(one, [a[source] for source in one.sources])
        ways, traces = learn(ways, traces, a, left_by_forward if rule.presynaptic == "forward" else a, "")

    new = [pack(rule, untraced(own), where, *way) for own, where, way in zip(synapses, places, ways, strict=True)]
    if rule.slow_synapses:  # a <- a + (w - a) (e + 1) / (t + 1 + e)
        for own, after, gene in zip(synapses, new, genes, strict=True):
            e = np.exp(gene.log_averaging)
            for name in ("kernel", "bias"):
                if name in own:
                    old = np.array(own[name + "_average"], np.float64)
                    after[name + "_average"] = old + (after[name] - old) * (e + 1) / (time + 1 + e)
    if rule.momentum != "none":
        for own, old, where, trace in zip(new, synapses, places, traces, strict=True):
            own |= {name + "_trace": value for name, value in pack(rule, traced(old), where, *trace).items()}
    return new, [np.moveaxis(a[number], -1, 0) for number in nodes], prediction


def reads(layer, shape):
    """The neurons that each position reads, `[position, place]`, and the target's shape.

    A place outside of the layer has the number -1.
    """
    numbers = np.arange(math.prod(shape)).reshape(shape)
    if not layer.window:
        return numbers.reshape(-1, shape[-1]), (*shape[:-1], layer.units)
    lengths, stride = shape[:-1], layer.stride
    counts = [-(-length // stride) for length in lengths]
    table = []
    for position in itertools.product(*map(range, counts)):
        row = []
        for tap in itertools.product(*map(range, layer.window)):
            place = []
            for axis, length in enumerate(lengths):
                missing = max((counts[axis] - 1) * stride + layer.window[axis] - length, 0)
                place.append(position[axis] * stride + tap[axis] - missing // 2)
            inside = all(0 <= one < length for one, length in zip(place, lengths, strict=True))
            row.extend(numbers[tuple(place)] if inside else [-1] * shape[-1])
        table.append(row)
    return np.array(table), (*counts, layer.units)


def stored_places(layer, inputs):
    """The input and the unit of each number of a stored kernel `[in, units]`; which synapses
    exist."""
    taps = math.prod(layer.window)
    channels = inputs // taps
    there, to = [], []
    if layer.own:
        there, to = [list(range(inputs))], [list(range(inputs))]
    else:
        for tap, channel in itertools.product(range(taps), range(channels // layer.groups)):
            group = [unit // (layer.units // layer.groups) for unit in range(layer.units)]
            there.append([tap * channels + one * (channels // layer.groups) + channel for one in group])
            to.append(list(range(layer.units)))
    there, to = np.array(there), np.array(to)
    exists = np.zeros((inputs, layer.units), bool)
    exists[there, to] = True
    return SimpleNamespace(there=there, to=to, exists=exists)


def patches(states, table):
    """`[batch, *features, state]` as rows `[row, place, state]`; places outside are zero."""
    flat = states.reshape(len(states), -1, states.shape[-1])
    flat = np.concatenate([flat, np.zeros_like(flat[:, :1])], axis=1)  # place -1
    return flat[:, table].reshape(-1, table.shape[1], states.shape[-1])


def unpatched(z, table, shape):
    """The transpose of `patches`: a neuron receives from every place that reads it."""
    flat = np.zeros((shape[0], math.prod(shape[1:-1]) + 1, shape[-1]))
    z = z.reshape(shape[0], *table.shape, shape[-1])
    for position, place in np.ndindex(table.shape):
        flat[:, table[position, place]] += z[:, position, place]
    return flat[:, :-1].reshape(shape)


def rows(states, layer):
    """The neurons of a layer as `[row, unit, state]`: positions are more examples."""
    return states.reshape(-1, layer.units, states.shape[-1])


def leads_on(operations, number):
    """Whether a path leads from a value to another layer."""
    return any(
        number == one.source if isinstance(one, Layer) else number in one.sources and leads_on(operations, target)
        for target, one in operations.items()
    )


def reader(operations, number):
    """The synapses that read a value, through maps or not; of several, the first."""
    for target, one in operations.items():
        if isinstance(one, Layer) and one.source == number:
            return one.synapses
        if isinstance(one, Map) and number in one.sources:
            return reader(operations, target)
    raise ValueError("nothing reads this value")


def through(one, states):
    """State 1 through a map, the other states through its Jacobian at state 1."""
    kind = MAPS[one.name]
    points = [own[..., 0] for own in states]
    others = [kind.change([own[..., c] for own in states], *points) for c in range(1, states[0].shape[-1])]
    return np.stack([kind.value(*points), *others], axis=-1)


def _windows(length, size):
    """The places along an axis of each window of stride 1, padding "same"."""
    ahead = (size - 1) // 2
    return [[one for one in range(i - ahead, i - ahead + size) if 0 <= one < length] for i in range(length)]


def _winners(x):
    """Where the largest entry of each 2 by 2 window is, the first of equals. Stride 1."""
    _, height, width, _ = x.shape
    found = {}
    for b, i, j, c in np.ndindex(x.shape):
        window = list(itertools.product(_windows(height, 2)[i], _windows(width, 2)[j]))
        found[b, i, j, c] = (b, *max(window, key=lambda place, b=b, c=c: x[(b, *place, c)]), c)
    return found


def pool(x):
    return pool_change([x], x)


def pool_change(changes, x):
    result = np.zeros_like(x)
    for place, winner in _winners(x).items():
        result[place] = changes[0][winner]
    return result


def pool_back(back, x):
    result = np.zeros_like(x)
    for place, winner in _winners(x).items():
        result[winner] += back[place]
    return (result,)


BATCH_EPSILON = 1e-3


def centred(x):
    """Each feature with mean 0 and deviation 1 over batch and positions."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axis=axes)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=axes) + BATCH_EPSILON)


def centred_jacobian(x):
    """The Jacobian of one feature `[n]`, row by row: `d y_i / d x_j`."""
    n = len(x)
    straight = x - x.mean()
    deviation = np.sqrt((straight**2).mean() + BATCH_EPSILON)
    result = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            slope_of_deviation = straight[j] / (n * deviation)
            result[i, j] = ((i == j) - 1 / n) / deviation - straight[i] * slope_of_deviation / deviation**2
    return result


def _by_feature(x, vectors, transposed):
    flat, given = x.reshape(-1, x.shape[-1]), vectors.reshape(-1, x.shape[-1])
    jacobians = [centred_jacobian(flat[:, c]) for c in range(x.shape[-1])]
    columns = [(own.T if transposed else own) @ given[:, c] for c, own in enumerate(jacobians)]
    return np.stack(columns, axis=-1).reshape(x.shape)


# For each map: its value, its Jacobian at a point times changes, and its transposed Jacobian.
MAPS = {
    "sum": SimpleNamespace(
        value=lambda x, y: x + y,
        change=lambda changes, x, y: changes[0] + changes[1],
        back=lambda back, x, y: (back, back),
    ),
    "product": SimpleNamespace(
        value=lambda x, y: x * y,
        change=lambda changes, x, y: changes[0] * y + x * changes[1],
        back=lambda back, x, y: (back * y, back * x),
    ),
    "flatten": SimpleNamespace(
        value=lambda x: x.reshape(len(x), -1),
        change=lambda changes, x: changes[0].reshape(len(x), -1),
        back=lambda back, x: (back.reshape(x.shape),),
    ),
    "relu": SimpleNamespace(
        value=lambda x: np.maximum(x, 0),
        change=lambda changes, x: (x > 0) * changes[0],
        back=lambda back, x: ((x > 0) * back,),
    ),
    "pool": SimpleNamespace(value=pool, change=pool_change, back=pool_back),
    "centre": SimpleNamespace(
        value=centred,
        change=lambda changes, x: _by_feature(x, changes[0], False),
        back=lambda back, x: (_by_feature(x, back, True),),
    ),
}


def layer_genome(genome, layer):
    """The numbers that one layer uses, by name."""
    own = genome.rule.layers is not None
    return SimpleNamespace(
        **{name: np.array(value[layer] if own else value, np.float64) for name, value in genome.arrays.items()}
    )


def with_bias(states, wanted):
    """The states and a unit that is 1 in every state."""
    if not wanted:
        return states
    return np.concatenate([states, np.ones_like(states[:, :1])], axis=1)


def untraced(own):
    """The synapses themselves."""
    return {name: value for name, value in own.items() if not name.endswith(("_trace", "_average"))}


def traced(own):
    """Their traces, by the names of the synapses."""
    return {name.removesuffix("_trace"): value for name, value in own.items() if name.endswith("_trace")}


def unpack(rule, own, places):
    """The two kernels, with all channels and a row for the bias, from what the library stores."""
    own = {name: np.array(value, np.float64) for name, value in own.items()}
    if rule.channels == "tied":
        own = {name: np.repeat(value, rule.states, axis=0) for name, value in own.items()}

    def whole(kernel, bias):
        result = np.zeros((*places.exists.shape, rule.states))
        if kernel is not None:
            for c in range(rule.states):
                result[places.there, places.to, c] = kernel[c].reshape(places.there.shape)
        if "bias" in own:
            row = np.zeros((1, *result.shape[1:])) if bias is None else np.moveaxis(bias, 0, -1)
            result = np.concatenate([result, row], axis=0)
        return result

    there = whole(own["kernel"], own.get("bias"))
    if rule.directions == "tied":
        return there, np.swapaxes(there, 0, 1)
    back = whole(own.get("backward_kernel"), own.get("backward_bias"))  # that of the first layer is never read
    return there, np.swapaxes(back, 0, 1)


def feedback_path(rule, there, back):
    """The backward kernel as what comes back goes through it: with the signs of the forward one, if
    the rule says so."""
    if rule.directions != "signs":
        return back
    signed = np.swapaxes(back, 0, 1).copy()
    for place in np.ndindex(signed.shape):
        signed[place] = abs(signed[place]) * ((there[place] > 0) * 1.0 - (there[place] < 0) * 1.0)
    return np.swapaxes(signed, 0, 1)


def pack(rule, own, places, there, back):
    """The opposite of `unpack`: the arrays that `own` has."""
    inputs = len(places.exists)
    result = {}
    for name, value in own.items():
        whole = np.swapaxes(back, 0, 1) if name.startswith("backward") else there
        whole = whole[places.there, places.to] if "kernel" in name else whole[inputs:]
        result[name] = np.moveaxis(whole, -1, 0)[: 1 if rule.channels == "tied" else None].reshape(value.shape)
    return result


def unit_norm(rule, gene, there, back):
    """Both kernels with unit norm over their inputs."""
    result = []
    for kernel in (there, back):
        new = kernel / np.sqrt(np.sum(kernel**2, axis=0) + 1e-9)
        result.append(new * gene.rescale if rule.rescale_synapses else new)
    if rule.directions == "tied":
        result[1] = np.swapaxes(result[0], 0, 1)
    return tuple(result)


def effective(rule, gene, there, back):
    """The kernels as the neurons see them."""
    return unit_norm(rule, gene, there, back) if rule.normalize_synapses in ("effective", "both") else (there, back)


def normalized(rule, z, scale, shift):
    """Summed inputs `[batch, unit, state]` brought to a learned mean and deviation."""
    axis = {"batch": 0, "units": 1}[rule.normalization_axis]
    mean = z.mean(axis=axis, keepdims=True)
    variance = ((z - mean) ** 2).mean(axis=axis, keepdims=True)
    return scale * (z - mean) / np.sqrt(variance + rule.normalization_epsilon) + shift


def forward(rule, gene, name, pre, kernel, old):
    """Equation 5."""
    s, slope = FUNCTIONS[name]
    new = np.zeros_like(old)
    z = np.zeros_like(old)
    for c in range(rule.states):
        for d in range(rule.states):
            z[:, :, c] += np.einsum("bi,ij->bj", pre[:, :, d] * gene.nu[d, c], kernel[:, :, c])
    if rule.normalize_activations in ("forward", "both"):
        z = normalized(rule, z, gene.forward_scale, gene.forward_shift)
    argument = gene.neuron_keep * old + gene.neuron_update * z
    for c in range(rule.states):
        new[:, :, c] = s(argument[:, :, c])
    if rule.derivative_state:  # equation 1
        new[:, :, 1] = slope(argument[:, :, 0])
    return new


def sent(rule, gene, post, kernel):
    """What a layer sends to the neurons that it reads: the sums of equation 6."""
    z = np.zeros((len(post), kernel.shape[1], rule.states))
    for c in range(rule.states):
        for d in range(rule.states):
            z[:, :, c] += np.einsum("bj,ji->bi", post[:, :, d] * gene.mu[d, c], kernel[:, :, c])
    return z


def backward(rule, gene, old, z):
    """Equation 6."""
    s, _ = FUNCTIONS[rule.backward_activation or rule.forward_activation]
    new = np.zeros_like(old)
    if rule.normalize_activations in ("backward", "both"):
        z = normalized(rule, z, gene.backward_scale, gene.backward_shift)
    for c in range(rule.states):
        if rule.backward_update == "additive":
            argument = gene.neuron_keep * old[:, :, c] + gene.neuron_update * z[:, :, c]
        elif rule.backward_update == "multiplicative_after_first" and c == 0:
            argument = gene.neuron_keep * old[:, :, c]
        else:
            argument = gene.neuron_keep * old[:, :, c] * z[:, :, c]
        new[:, :, c] = s(argument)
    return new


def hebb(nu_tilde, mu_tilde, pre, post, share):
    """The sum in equation 7, `[from, to, channel]`."""
    k = len(nu_tilde)
    result = np.zeros((pre.shape[1], post.shape[1], k))
    for c in range(k):
        for e in range(k):
            for d in range(k):
                strength = nu_tilde[e, c] * mu_tilde[c, d]
                result[:, :, c] += strength * np.einsum("b,bi,bj->ij", share, pre[:, :, e], post[:, :, d])
    return result


def blocks(places, extra):
    """The rows and the columns of each group of units that read the same inputs, `extra` bias rows
    last."""
    found = {}
    for unit in range(places.exists.shape[1]):
        found.setdefault(places.exists[:, unit].tobytes(), []).append(unit)
    inputs = len(places.exists)
    for units in found.values():
        yield np.array([*np.flatnonzero(places.exists[:, units[0]]), *range(inputs, inputs + extra)]), np.array(units)


def whitened(change, gram, places, has_bias, damping, count):
    """Equation W1 on each group of units: `(X^T X / s + damping)^-1 H` with
    `s = trace(X^T X) / examples`."""
    result = change.copy()
    for there, units in blocks(places, int(has_bias)):
        for c in range(change.shape[-1]):
            system = gram[np.ix_(there, there)][..., c]
            trace = np.trace(system)
            system = system * (count / trace if trace > 0 else 1.0) + damping * np.eye(len(there))
            result[np.ix_(there, units, [c])] = np.linalg.solve(system, change[np.ix_(there, units)][..., c])[..., None]
    return result


def orthogonal_term(rule, change, places):
    """Equation N2 on the singular values of each group of units."""
    result = np.zeros_like(change)
    for there, units in blocks(places, len(change) - len(places.exists)):
        for c in range(rule.states):
            left, values, right = np.linalg.svd(change[np.ix_(there, units)][..., c], full_matrices=False)
            norm = np.sqrt(np.sum(values**2))
            values = values / (norm if norm > 0 else 1.0)
            values = 2.8 * values - 2.2 * values**3
            for _ in range(rule.orthogonal_iterations - 1):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            result[np.ix_(there, units, [c])] = ((left * values) @ right)[..., None]
    return result


def sized_term(rule, change, places):
    """Equation N1: the norm of all groups of units together, each of rank `term_rank` at most."""
    size = 0.0
    for there, units in blocks(places, len(change) - len(places.exists)):
        rank = min(len(there), len(units), rule.term_rank or np.inf)
        size += rank * max(1.0, len(units) / len(there))
    norm = np.sqrt(np.sum(change**2, axis=(0, 1), keepdims=True))
    return change * np.sqrt(size) / np.where(norm > 0, norm, 1.0)


def each_way(function, changes, own):
    """A function of the terms of both kernels, that of the way back as it is stored, `[in, out]`:
    with the bias only if it has one."""
    rows = None if "backward_bias" in own or "bias" not in own else -1
    back = np.swapaxes(changes[1], 0, 1).copy()
    back[:rows] = function(back[:rows])
    return [function(changes[0]), np.swapaxes(back, 0, 1)]


def whitened_both(gene, changes, grams, own, places, count):
    """Equation W1 on the terms of both kernels."""
    damping = np.exp(gene.log_damping)
    there = whitened(changes[0], grams[0], places, "bias" in own, damping, count)
    back = whitened(np.swapaxes(changes[1], 0, 1), grams[1], places, "backward_bias" in own, damping, count)
    return [there, np.swapaxes(back, 0, 1)]


def terms(rule, gene, prefix, pre, post, own, places, examples, weights, rows_of_group):
    """Sums over rows: the Hebbian terms of both kernels, and the squares for Oja's term.

    With groups of rows the terms are whitened, equation W3: those of each group by its own rows. No
    Gram matrices are left then. Unless momentum comes before N2, the terms of the groups also went
    through N2 (equation N3).
    """
    exists = places.exists
    nu_tilde, mu_tilde = getattr(gene, prefix + "nu_tilde"), getattr(gene, prefix + "mu_tilde")
    share = np.ones(examples) if weights is None else np.array(weights, np.float64)
    if rule.batch_reduction == "mean":
        share = share / examples
    share = np.repeat(share, len(post) // examples)
    inputs = len(exists)
    size = np.repeat(np.ones(examples) if weights is None else np.abs(weights), len(post) // examples)

    def terms_and_grams(one):
        """The terms and the Gram matrices of some of the rows."""
        changes = [
            hebb(nu_tilde, mu_tilde, pre[one], post[one], share[one]),
            hebb(nu_tilde, mu_tilde, post[one], pre[one], share[one]),
        ]
        changes[0][:inputs][~exists] = 0
        changes[1][:, :inputs][~exists.T] = 0
        grams = []
        for transform in (nu_tilde, mu_tilde.T):
            read = np.einsum("bid,dc->bic", pre[one], transform)
            grams.append(np.einsum("b,bic,bjc->ijc", size[one], read, read))
        return changes, grams

    if rows_of_group is None:
        changes, grams = terms_and_grams(slice(None))
    else:
        changes, grams = [0.0, 0.0], [None, None]
        for start in range(0, len(post), rows_of_group):
            group = slice(start, start + rows_of_group)
            count = np.sum(size[group]) * examples / len(post)
            done = whitened_both(gene, *terms_and_grams(group), own, places, count)
            if rule.normalize_term == "orthogonal" and rule.momentum != "before":
                done = each_way(lambda change: orthogonal_term(rule, change, places), done, own)
            changes = [old + new for old, new in zip(changes, done, strict=True)]
    sizes = []
    for target in (post, pre):
        squares = np.einsum("cd,bjd->bjc", mu_tilde, target) ** 2
        sizes.append(np.einsum("b,bjc->jc", share, squares)[None])
    if "bias" in own:
        sizes[1][:, -1] = 0  # the bias unit has no activation
    return [*changes, *sizes, *grams]


def update(rule, gene, prefix, kernels, traces, sums, own, places, time, count):
    """Equation 7 with its stabilisers for both kernels of a set of synapses; and their traces."""
    numbers = {name: getattr(gene, prefix + name, None) for name in (
        "nu_tilde", "mu_tilde", "synapse_keep", "synapse_update", "oja_multiplier", "saturation",
    )}  # fmt: skip
    keep, gate = numbers["synapse_keep"], numbers["synapse_update"]
    if rule.update_decay == "power":
        gate = gate * (1 + time / np.exp(gene.log_decay_steps)) ** -gene.decay_power

    changes, sizes, grams = sums[:2], sums[2:4], sums[4:]
    if rule.whitening and grams[0] is not None:
        changes = whitened_both(gene, changes, grams, own, places, count)
    if rule.directions != "untied":
        changes[1] = np.swapaxes(changes[0], 0, 1)
    if rule.channels != "own":
        changes = [np.repeat(change[:, :, :1], rule.states, axis=-1) for change in changes]

    def follow(traces, changes):
        """Nesterov's form of momentum."""
        traces = [gene.momentum * trace + change for trace, change in zip(traces, changes, strict=True)]
        return traces, [change + gene.momentum * trace for trace, change in zip(traces, changes, strict=True)]

    if rule.momentum == "before":
        traces, changes = follow(traces, changes)
    in_groups = rule.whitening and grams[0] is None
    if rule.normalize_term == "orthogonal" and not (in_groups and rule.momentum != "before"):
        changes = each_way(lambda change: orthogonal_term(rule, change, places), changes, own)
    if rule.normalize_term != "none":
        changes = each_way(lambda change: sized_term(rule, change, places), changes, own)
    if rule.directions != "untied":
        changes[1] = np.swapaxes(changes[0], 0, 1)
    if rule.momentum == "after":
        traces, changes = follow(traces, changes)

    result = []
    for way, (kernel, change, square) in enumerate(zip(kernels, changes, sizes, strict=True)):
        if way == 1 and rule.directions in ("fixed", "signs"):
            result.append(kernel)
            continue
        if rule.oja != "none":  # equation 8, first term
            size = np.sum(kernel**2, axis=0, keepdims=True) if rule.oja == "weights" else square
            strength = rule.oja_factor * (np.abs(numbers["oja_multiplier"]) if rule.oja_learned else 1.0)
            change = change - np.sign(gate) * strength * size * kernel
        if rule.saturation == "exp_update":
            damping = np.exp(-np.abs(kernel) * (rule.saturation_epsilon + np.abs(numbers["saturation"])))
            new = kernel + ((keep - 1) * kernel + gate * change) * damping
        else:
            new = keep * kernel + gate * change
        if rule.saturation == "tanh":
            new = numbers["saturation"] * np.tanh(new / numbers["saturation"])
        result.append(np.repeat(new[:, :, :1], rule.states, axis=-1) if rule.channels == "tied" else new)
    if rule.directions == "tied":
        result[1] = np.swapaxes(result[0], 0, 1)
    return tuple(result), traces
