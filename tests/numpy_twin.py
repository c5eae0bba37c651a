"""A second opinion: one learning step in plain float64 numpy, as clumsy and as close to the paper as it can be.

Written from equations 5, 6 and 7 of "Meta-Learning Bidirectional Update Rules" (Sandler et al., ICML 2021, sections 3.2
to 3.4, appendices B and C.6), not from the library. No work is saved here: every neuron has all k states, the input
too; every synapse has all k channels in both directions, those of the first layer too; the bias is a unit that is
always 1.
Neurons are `[batch, unit, state]`; synapses `[from, to, channel]`, the last row (or, on the way back, column) the bias.
"""

from types import SimpleNamespace

import numpy as np

FUNCTIONS = {
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "relu_tanh": (lambda z: np.maximum(np.tanh(z), 0), lambda z: (z > 0) * (1 - np.tanh(z) ** 2)),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2),
    "linear": (lambda z: z, np.ones_like),
}


def step(genome, synapses, inputs, labels, *, time=0, neurons=None, weights=None, loss_slope=None, activations=None):
    """One learning step.

    Args:
        genome: a Genome without population axes.
        synapses: a dict of arrays `[channel, in, out]` for each layer, as the library holds them.
        inputs: `[batch, n]`.
        labels: `[batch, classes]`, what state 2 of the output receives; or what `loss_slope` takes.
        time: the learning step, from 0.
        neurons: what the step before returned, if the rule keeps neurons.
        weights: weight of each example in the Hebbian term.
        loss_slope: for feedback="error": maps prediction and labels to the derivative of the loss.
        activations: nonlinearity of each layer, or None for the rule's.

    Returns:
        New synapses (as given), neurons (`[state, batch, unit]` each), and the prediction before learning.
    """
    rule = genome.rule
    genes = [layer_genome(genome, layer) for layer in range(len(synapses))]
    inputs = np.asarray(inputs, np.float64)
    has_bias = ["bias" in own for own in synapses]
    sizes = [inputs.shape[1]] + [own["kernel"].shape[-1] for own in synapses]

    # 1. Neurons start at zero, or where they were; the input's state 1 is the example.
    a = [np.zeros((len(inputs), size, rule.states)) for size in sizes]
    if rule.keep_neurons and neurons is not None:
        a = [np.moveaxis(np.array(old, np.float64), 0, -1) for old in neurons]
    a[0] = np.zeros_like(a[0])
    a[0][:, :, 0] = inputs

    # 2. Synapses, normalised where they are stored.
    ways = [unpack(rule, untraced(own)) for own in synapses]
    traces = [unpack(rule, traced(own)) if rule.momentum else None for own in synapses]
    if rule.normalize_synapses in ("stored", "both"):
        ways = [unit_norm(rule, gene, *way) for gene, way in zip(genes, ways, strict=True)]

    # 3. Forward, equation 5.
    for layer, gene in enumerate(genes):
        last = layer == len(genes) - 1
        name = rule.last_activation if last else rule.forward_activation
        if activations is not None and activations[layer] is not None:
            name = activations[layer]
        there, _ = effective(rule, gene, *ways[layer])
        a[layer + 1] = forward(rule, gene, name, with_bias(a[layer], has_bias[layer]), there, a[layer + 1])
    left_by_forward = [states.copy() for states in a]
    prediction = a[-1][:, :, 0] / genes[-1].temperature

    # 4. Synapses may change before any feedback.
    if rule.forward_synapse_update:
        prefix = "forward_" if rule.separate_forward_synapse else ""
        for layer, gene in enumerate(genes):
            pre = with_bias(a[layer], has_bias[layer])
            way, _ = learn(rule, gene, prefix, ways[layer], None, pre, a[layer + 1], synapses[layer], time, weights)
            ways[layer] = way

    if time % rule.supervised_every == 0:
        # 5. Feedback into state 2 of the output.
        given = labels
        if rule.feedback == "error":
            given = loss_slope(prediction, labels) / genes[-1].temperature
            if rule.derivative_state:
                given = given * a[-1][:, :, 1]
        a[-1][:, :, 2:] = 0
        a[-1][:, :, 1] = given

        # 6. Backward, equation 6: from the layer before the last down to the first hidden one.
        for layer in range(len(genes) - 1, 0, -1):
            _, back = effective(rule, genes[layer], *ways[layer])
            a[layer] = backward(rule, genes[layer], a[layer], a[layer + 1], back[:, : sizes[layer]])

        # 7. Synapses, equation 7.
        for layer, gene in enumerate(genes):
            pre = left_by_forward[layer] if rule.presynaptic == "forward" else a[layer]
            pre = with_bias(pre, has_bias[layer])
            own = synapses[layer]
            way, trace = learn(rule, gene, "", ways[layer], traces[layer], pre, a[layer + 1], own, time, weights)
            ways[layer], traces[layer] = way, trace

    new = [pack(rule, untraced(own), *way) for own, way in zip(synapses, ways, strict=True)]
    if rule.momentum:
        for own, trace in zip(new, traces, strict=True):
            own |= {name + "_trace": value for name, value in pack(rule, own, *trace).items()}
    return new, [np.moveaxis(states, -1, 0) for states in a], prediction


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
    return {name: value for name, value in own.items() if not name.endswith("_trace")}


def traced(own):
    """Their traces, by the names of the synapses."""
    return {name.removesuffix("_trace"): value for name, value in own.items() if name.endswith("_trace")}


def unpack(rule, own):
    """The two kernels, with all channels and a row for the bias, from what the library stores."""
    own = {name: np.array(value, np.float64) for name, value in own.items()}
    if rule.channels == "tied":
        own = {name: np.repeat(value, rule.states, axis=0) for name, value in own.items()}
    there = [own["kernel"]] + ([own["bias"]] if "bias" in own else [])
    there = np.moveaxis(np.concatenate(there, axis=1), 0, -1)
    if rule.directions == "tied":
        return there, np.swapaxes(there, 0, 1)
    back = own.get("backward_kernel", np.zeros_like(own["kernel"]))  # that of the first layer is never read
    if "bias" in own:
        back = np.concatenate([back, own.get("backward_bias", np.zeros_like(own["bias"]))], axis=1)
    return there, np.transpose(back, (2, 1, 0))


def pack(rule, own, there, back):
    """The opposite of `unpack`: the arrays that `own` has."""
    inputs = own["kernel"].shape[-2]
    channels = slice(0, 1 if rule.channels == "tied" else None)
    there, back = np.moveaxis(there, -1, 0), np.transpose(back, (2, 1, 0))
    every = {
        "kernel": there[:, :inputs],
        "bias": there[:, inputs:],
        "backward_kernel": back[:, :inputs],
        "backward_bias": back[:, inputs:],
    }
    return {name: every[name][channels] for name in own}


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


def backward(rule, gene, old, post, kernel):
    """Equation 6."""
    s, _ = FUNCTIONS[rule.backward_activation or rule.forward_activation]
    new = np.zeros_like(old)
    z = np.zeros_like(old)
    for c in range(rule.states):
        for d in range(rule.states):
            z[:, :, c] += np.einsum("bj,ji->bi", post[:, :, d] * gene.mu[d, c], kernel[:, :, c])
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


def orthogonal(rule, change):
    """Each channel's matrix with its singular values put through the iteration, by the singular values themselves."""
    result = np.zeros_like(change)
    for c in range(rule.states):
        left, values, right = np.linalg.svd(change[:, :, c], full_matrices=False)
        values = values / np.sqrt(np.sum(values**2))
        for _ in range(rule.orthogonalize):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        rows, columns = change.shape[:2]
        result[:, :, c] = (left * values) @ right * max(1.0, np.sqrt(columns / rows))
    return result


def learn(rule, gene, prefix, kernels, traces, pre, post, own, time, weights):
    """Equation 7 for both kernels between two layers, with its stabilisers; and the traces of both."""
    has_bias = "bias" in own
    numbers = {name: getattr(gene, prefix + name, None) for name in (
        "nu_tilde", "mu_tilde", "synapse_keep", "synapse_update", "oja_multiplier", "saturation",
    )}  # fmt: skip
    keep, gate = numbers["synapse_keep"], numbers["synapse_update"]
    if rule.update_decay == "power":
        gate = gate * (1 + time / rule.decay_steps) ** -gene.decay_power
    share = np.ones(len(pre)) if weights is None else np.array(weights, np.float64)
    if rule.batch_reduction == "mean":
        share = share / len(pre)

    changes = [
        hebb(numbers["nu_tilde"], numbers["mu_tilde"], pre, post, share),
        hebb(numbers["nu_tilde"], numbers["mu_tilde"], post, pre, share),
    ]
    if rule.directions != "untied":
        changes[1] = np.swapaxes(changes[0], 0, 1)
    if rule.channels != "own":
        changes = [np.repeat(change[:, :, :1], rule.states, axis=-1) for change in changes]

    if rule.momentum:
        traces = [gene.momentum * trace + change for trace, change in zip(traces, changes, strict=True)]
        changes = [change + gene.momentum * trace for trace, change in zip(traces, changes, strict=True)]
    if rule.orthogonalize:
        forward = orthogonal(rule, changes[0])
        if rule.directions != "untied":
            changes = [forward, np.swapaxes(forward, 0, 1)]
        else:  # as the way back is stored, [in, out]: with the bias only if it has one
            rows = None if "backward_bias" in own or not has_bias else -1
            way_back = np.swapaxes(changes[1], 0, 1).copy()
            way_back[:rows] = orthogonal(rule, way_back[:rows])
            changes = [forward, np.swapaxes(way_back, 0, 1)]

    result = []
    for direction, (kernel, change, target) in enumerate(zip(kernels, changes, (post, pre), strict=True)):
        if rule.oja != "none":  # equation 8, first term
            if rule.oja == "weights":
                size = np.sum(kernel**2, axis=0, keepdims=True)
            else:
                size = np.einsum("b,bjc->jc", share, np.einsum("cd,bjd->bjc", numbers["mu_tilde"], target) ** 2)
                if direction == 1 and has_bias:
                    size[-1] = 0  # the bias unit has no activation
                size = size[None]
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
