"""Rules for tables of tests, and random genomes, synapses and batches that go with them.

`SINGLE` has every option of a `Rule` on its own, `COVER` every value of every option in few rules,
and `combinations` draws legal mixtures.
"""

import itertools

import numpy as np

from keras_blur import Genome, Rule
from keras_blur.core import graph
from keras_blur.core.companions import companions
from keras_blur.core.connections.dense import DenseConnection
from keras_blur.core.rule import ACTIVATIONS, CHOICES

SIZES = (5, 7, 6, 3)
BATCH = 4
SWITCHES = (
    "derivative_state", "oja_learned", "rescale_synapses", "forward_synapse_update", "separate_forward_synapse",
    "keep_neurons", "whitening", "slow_synapses",
)  # fmt: skip
BOTH_WAYS = {"normalize_activations": "both"}

SINGLE = {
    "default": {},
    "three_states": {"states": 3},
    "four_states": {"states": 4},
    **{f"forward_{name}": {"forward_activation": name} for name in ACTIVATIONS},
    **{f"backward_{name}": {"backward_activation": name} for name in ACTIVATIONS},
    **{f"last_{name}": {"last_activation": name} for name in ACTIVATIONS},
    **{f"pair_{name}": {"derivative_state": True, "forward_activation": name} for name in ACTIVATIONS},
    "pair_three_states": {"derivative_state": True, "states": 3},
    "pair_normalized": {"derivative_state": True, "states": 3, **BOTH_WAYS},
    "pair_kept": {"derivative_state": True, "states": 3, "keep_neurons": True},
    "pair_tied": {"derivative_state": True, "states": 3, "channels": "tied"},
    "multiplicative": {"backward_update": "multiplicative"},
    "after_first": {"backward_update": "multiplicative_after_first"},
    "after_first_normalized": {"backward_update": "multiplicative_after_first", "states": 3, **BOTH_WAYS},
    "after_first_tied": {"backward_update": "multiplicative_after_first", "states": 3, "channels": "tied"},
    "directions_tied": {"directions": "tied"},
    "directions_tied_updates": {"directions": "tied_updates"},
    **{
        f"{directions}{name}": {"directions": directions, **options}
        for directions in ("fixed", "signs")
        for name, options in {
            "": {},
            "_pair": {"derivative_state": True, "backward_update": "multiplicative_after_first", "channels": "tied"},
            "_effective": {"normalize_synapses": "effective", "rescale_synapses": True},
            "_stable": {
                "oja": "activations",
                "saturation": "exp_update",
                "momentum": "before",
                "normalize_term": "frobenius",
            },
            "_kept": {"forward_synapse_update": True, "oja": "weights", "keep_neurons": True},
        }.items()
    },
    "channels_tied": {"channels": "tied", "states": 3},
    "channels_tied_updates": {"channels": "tied_updates", "states": 3},
    "all_tied": {"channels": "tied", "directions": "tied"},
    **{
        f"normalize_{way}_{axis}": {"normalize_activations": way, "normalization_axis": axis}
        for way in ("forward", "backward", "both")
        for axis in ("batch", "units")
    },
    "normalization_epsilon": {"normalization_epsilon": 0.3, **BOTH_WAYS},
    "oja_weights": {"oja": "weights", "oja_factor": 0.7},
    "oja_activations": {"oja": "activations", "oja_factor": 0.7},
    "oja_activations_mean": {"oja": "activations", "batch_reduction": "mean"},
    "oja_activations_tied": {"oja": "activations", "channels": "tied", "directions": "tied"},
    "oja_learned": {"oja": "weights", "oja_learned": True},
    "exp_update": {"saturation": "exp_update", "saturation_epsilon": 0.2},
    "saturation_tanh": {"saturation": "tanh"},
    **{f"synapses_{place}": {"normalize_synapses": place} for place in ("stored", "effective", "both")},
    **{
        f"rescaled_{place}_{directions}": {
            "normalize_synapses": place,
            "rescale_synapses": True,
            "directions": directions,
        }
        for place in ("stored", "effective", "both")
        for directions in ("untied", "tied")
    },
    "forward_update": {"forward_synapse_update": True},
    "forward_update_separate": {"forward_synapse_update": True, "separate_forward_synapse": True},
    "forward_update_stable": {
        "forward_synapse_update": True,
        "separate_forward_synapse": True,
        "oja": "activations",
        "oja_learned": True,
        "saturation": "exp_update",
    },
    "supervised_every": {"supervised_every": 2},
    "supervised_every_forward": {"supervised_every": 2, "forward_synapse_update": True, "keep_neurons": True},
    "presynaptic": {"presynaptic": "forward"},
    "keep_neurons": {"keep_neurons": True},
    "layers": {"layers": len(SIZES) - 1},
    "decay": {"update_decay": "power"},
    "decay_oja": {"update_decay": "power", "oja": "weights", "saturation": "exp_update"},
    "momentum": {"momentum": "before"},
    "momentum_after": {"momentum": "after", "normalize_term": "frobenius"},
    "momentum_stable": {
        "momentum": "before",
        "update_decay": "power",
        "oja": "activations",
        "saturation": "exp_update",
        "supervised_every": 2,
        "normalize_synapses": "stored",
    },
    **{
        f"orthogonal_{directions}": {
            "normalize_term": "orthogonal",
            "orthogonal_iterations": 3,
            "directions": directions,
            "channels": channels,
        }
        for directions, channels in (("untied", "own"), ("tied", "tied"), ("tied_updates", "tied_updates"))
    },
    "term_rank": {"normalize_term": "frobenius", "term_rank": 2},
    "orthogonal_momentum": {"normalize_term": "orthogonal", "momentum": "before", "oja": "weights", "update_decay": "power"},
    **{
        f"whitening_{norm}_{directions}": {
            "whitening": True,
            "normalize_term": norm,
            "directions": directions,
            "channels": channels,
            "momentum": "none" if norm == "none" else "after",
        }
        for norm in ("none", "frobenius", "orthogonal")
        for directions, channels in (("untied", "own"), ("tied", "tied"), ("tied_updates", "tied_updates"))
    },
    **{
        f"whitening_rows_{norm}_{rows}": {
            "whitening": True,
            "whitening_rows": rows,
            "normalize_term": norm,
            "batch_reduction": reduction,
        }
        for norm, rows, reduction in (
            ("none", 1, "mean"),
            ("frobenius", 2, "sum"),
            ("frobenius", 3, "mean"),
            ("orthogonal", 3, "sum"),
            ("none", 4, "sum"),
            ("orthogonal", 9, "sum"),
        )
    },
    "whitening_orthogonal_before": {"whitening": True, "normalize_term": "orthogonal", "momentum": "before"},
    "whitening_pair": {
        "whitening": True,
        "normalize_term": "frobenius",
        "momentum": "before",
        "feedback": "error",
        "derivative_state": True,
    },
    "slow_synapses": {"slow_synapses": True},
    "mean": {"batch_reduction": "mean"},
    "error": {"feedback": "error", "loss": "mean_squared_error"},
    "error_pair": {"feedback": "error", "derivative_state": True},
}

COVER = {
    "plain": {},
    "three": {
        "states": 3, "forward_activation": "relu_tanh", "backward_activation": "linear", "last_activation": "linear",
        "oja": "weights", "oja_learned": True, "saturation": "exp_update", "batch_reduction": "mean",
        "normalize_activations": "backward",
    },
    "pair": {
        "derivative_state": True, "backward_update": "multiplicative_after_first", "directions": "tied",
        "channels": "tied", "feedback": "error", "forward_activation": "sigmoid", "backward_activation": "linear",
        "last_activation": "relu_tanh",
    },
    "batch": {
        **BOTH_WAYS, "channels": "tied_updates", "update_decay": "power", "keep_neurons": True,
        "forward_activation": "relu", "last_activation": "sigmoid", "directions": "fixed",
    },
    "units": {
        "normalize_activations": "forward", "normalization_axis": "units", "directions": "tied_updates",
        "presynaptic": "forward",
    },
    "stored": {
        "normalize_synapses": "stored", "rescale_synapses": True, "oja": "activations", "supervised_every": 2,
        "forward_activation": "linear", "last_activation": "relu",
    },
    "effective": {
        "normalize_synapses": "effective", "forward_synapse_update": True, "separate_forward_synapse": True,
        "saturation": "tanh", "directions": "signs",
    },
    "layers": {"layers": len(SIZES) - 1, "normalize_synapses": "both", "backward_update": "multiplicative"},
    "orthogonal": {"normalize_term": "orthogonal", "momentum": "before", "update_decay": "power"},
    "whitened": {
        "whitening": True, "normalize_term": "frobenius", "momentum": "after", "slow_synapses": True,
        "directions": "tied_updates",
    },
    "whitened_rows": {"whitening": True, "whitening_rows": 3, "momentum": "before", "normalize_term": "frobenius"},
}  # fmt: skip

_DRAWN = {
    **CHOICES,
    "states": (2, 3, 4),
    "backward_activation": (None, *ACTIVATIONS),
    **dict.fromkeys(SWITCHES, (False, True)),
    "oja_factor": (1.0, 0.4),
    "supervised_every": (1, 2),
    "orthogonal_iterations": (1, 2),
    "term_rank": (None, 1, 2),
    "whitening_rows": (None, 2, 3),
    "layers": (None, len(SIZES) - 1),
}


def combinations(count, seed=0):
    """Draws every option of `count` rules at random, then repairs conflicting options."""
    rng = np.random.default_rng(seed)
    rules = {}
    for index in range(count):
        drawn = {name: values[rng.integers(len(values))] for name, values in _DRAWN.items()}
        drawn["oja_learned"] &= drawn["oja"] != "none"
        drawn["rescale_synapses"] &= drawn["normalize_synapses"] != "none"
        drawn["separate_forward_synapse"] &= drawn["forward_synapse_update"]
        drawn["whitening_rows"] = drawn["whitening_rows"] if drawn["whitening"] else None
        drawn["term_rank"] = drawn["term_rank"] if drawn["normalize_term"] != "none" else None
        drawn["momentum"] = "none" if drawn["forward_synapse_update"] else drawn["momentum"]
        rules[f"random_{index}"] = drawn
    return rules


def never_set(table):
    """Names of options whose default is the only value that a table of rules has."""
    usual = Rule().get_config()
    return [name for name in usual if all(options.get(name, usual[name]) == usual[name] for options in table.values())]


def never_chosen(table):
    """Values of options with a choice that no rule of a table has."""
    rules = [Rule(**options) for options in table.values()]
    return [
        (name, value)
        for name, values in {**CHOICES, **dict.fromkeys(SWITCHES, (False, True))}.items()
        for value in values
        if all(getattr(rule, name) != value for rule in rules)
    ]


def draw_genome(rule, seed=0, population=(), dtype="float64"):
    """A random genome without special values such as 0 or 1."""
    rng = np.random.default_rng(seed)
    leading = (() if rule.layers is None else (rule.layers,)) + tuple(population)
    arrays = {}
    for name, shape in rule.shapes().items():
        shape = leading + shape
        if name.endswith(("nu", "mu", "nu_tilde", "mu_tilde")):
            value = 0.6 * rng.standard_normal(shape)
        elif name.endswith("synapse_update"):
            value = rng.choice([-0.03, 0.02], shape) * rng.uniform(0.8, 1.2, shape)
        elif name.startswith("log_"):
            value = rng.uniform(-0.3, 0.3, shape)
        elif name.endswith("shift"):
            value = rng.uniform(-0.2, 0.2, shape)
        elif name.endswith("oja_multiplier"):
            value = rng.uniform(-1.2, -0.8, shape)
        else:  # gates, scales and saturations, all near one
            value = rng.uniform(0.8, 1.2, shape)
        arrays[name] = np.asarray(value, dtype)
    return Genome(rule, arrays)


def draw_synapses(rule, seed=0, sizes=SIZES, leading=(), *, whole=False, use_bias=True, dtype="float64"):
    """Random synapses of a chain of dense layers; with `whole` the backward arrays that nothing
    reads, too."""
    rng = np.random.default_rng(seed)
    result = []
    for index, (inputs, units) in enumerate(itertools.pairwise(sizes)):
        shapes = DenseConnection(units, use_bias).shapes(rule, inputs, feeds_back=whole or index > 0)
        if whole and "backward_kernel" in shapes and use_bias:
            shapes["backward_bias"] = shapes["bias"]
        shapes |= {name: shapes[like] for name, like in companions(rule, tuple(shapes)).items()}
        result.append({name: rng.normal(0, 0.5, leading + shape).astype(dtype) for name, shape in shapes.items()})
    return tuple(result)


def draw_batch(seed=0, sizes=SIZES, batch=BATCH, leading=(), dtype="float64"):
    """Inputs and labels, +1 for the true class and -1 for others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (*leading, batch, sizes[0]))
    y = 2 * np.eye(sizes[-1])[rng.integers(sizes[-1], size=(*leading, batch))] - 1
    return x.astype(dtype), y.astype(dtype)


def dense_chain(sizes=SIZES, use_bias=True):
    """A chain of dense connections."""
    return graph.chain([DenseConnection(units, use_bias) for units in sizes[1:]])
