"""Numbers from a comparison: envelopes of tuned optimizers by step and by second, and speed-ups.

An envelope is the best mean accuracy over all settings of optimizers, chosen separately at each
step or second. Between scored steps, accuracies are interpolated linearly in the logarithm of the
step. The "curve" of a decayed rate runs over horizons and is interpolated in the same way.

The speed-up at an accuracy is the time until the first optimizer reaches it, divided by the
genome's time. The reported speed-up is the interquartile mean over accuracies spaced evenly from
where both begin to where the lower one ends. The interquartile mean is that of "Deep Reinforcement
Learning at the Edge of the Statistical Precipice" (Agarwal et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

GENOME, NORMALIZED_GENOME = "genome", "genome, normalized"  # curves of the genome, by its network
TARGETS = 50  # number of accuracies over which a speed-up is averaged


def variants(result: Mapping[str, Any]) -> list[str]:
    """The networks of a result's optimizers: `"plain"`, `"normalized"`."""
    return list(dict.fromkeys(one["network"] for one in result["curves"].values() if "optimizer" in one))


def candidates(result: Mapping[str, Any], variant: str) -> dict[str, Mapping[str, Any]]:
    """The optimizers' curves of a network, only those with the largest number of seeds."""
    own = {name: one for name, one in result["curves"].items() if one.get("network") == variant and "optimizer" in one}
    most = max((len(one["accuracy"]) for one in own.values()), default=0)
    return {name: one for name, one in own.items() if len(one["accuracy"]) == most}


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Computes envelopes and speed-ups from the curves of a comparison.

    Args:
        result: `steps` and `curves`.

    Returns:
        By network: `envelopes`, with the accuracy at each step and `which` curve reached it;
        `best`, each optimizer's best curve at the last step; `edges`, the curves of an envelope
        whose rate ends its grid; and `speedup` in `steps` and in `seconds`, `None` where no
        accuracy is reached by both. These are the genome's in the plain network;
        `normalized_speedup` is that of the genome in the network with batch normalisation against
        the optimizers there. `by_seconds` has the accuracies of the genome and the envelopes at the
        times at which the fastest plain optimizer has done `steps`.
    """
    genomes = {name: result["curves"][name] for name in (GENOME, NORMALIZED_GENOME) if name in result["curves"]}
    found: dict[str, Any] = {"envelopes": {}, "best": {}, "edges": {}, "speedup": {}}
    for variant in variants(result):
        own = candidates(result, variant)
        means = {name: _mean(one) for name, one in own.items()}
        table = np.array(list(means.values()))  # [curves, scores]
        which = [list(means)[place] for place in np.argmax(table, axis=0)]
        accuracy = [float(means[name][place]) for place, name in enumerate(which)]
        found["envelopes"][variant] = {"accuracy": accuracy, "which": which}
        found["best"][variant] = {
            optimizer: max((n for n in own if own[n]["optimizer"] == optimizer), key=lambda n: means[n][-1])
            for optimizer in dict.fromkeys(one["optimizer"] for one in own.values())
        }
        found["edges"][variant] = [name for name in dict.fromkeys(which[1:]) if _at_edge(result["curves"], name)]
        found["speedup"][variant] = {unit: speedup(result, variant, unit) for unit in ("steps", "seconds")}
    if NORMALIZED_GENOME in genomes:
        found["normalized_speedup"] = {
            unit: speedup(result, "normalized", unit, NORMALIZED_GENOME) for unit in ("steps", "seconds")
        }
    fastest = min(
        (one for one in result["curves"].values() if one.get("network") == "plain"), key=lambda one: one["seconds"][-1]
    )
    times = fastest["seconds"]
    found["by_seconds"] = {"seconds": times}
    found["by_seconds"] |= {name: [at_second(result, one, time) for time in times] for name, one in genomes.items()}
    found["by_seconds"] |= {
        variant: [max(at_second(result, one, time) for one in candidates(result, variant).values()) for time in times]
        for variant in variants(result)
    }
    return found


def at_second(result: Mapping[str, Any], curve: Mapping[str, Any], second: float) -> float:
    """The mean accuracy of a curve at a time in seconds; after the last score, that of the last."""
    per_step = curve["seconds"][-1] / result["steps"][-1]
    return float(np.interp(_log(second / per_step), _log(result["steps"]), _mean(curve)))


def steps_to(result: Mapping[str, Any], curve: Mapping[str, Any], accuracy: float) -> float:
    """Interpolated number of steps until a curve first reaches an accuracy; infinite if never."""
    steps, reached = _log(result["steps"]), np.maximum.accumulate(_mean(curve))
    if accuracy > reached[-1]:
        return np.inf
    after = int(np.argmax(reached >= accuracy))
    if after == 0:
        return 0.0
    part = (accuracy - reached[after - 1]) / (reached[after] - reached[after - 1])
    return float(np.expm1(steps[after - 1] + part * (steps[after] - steps[after - 1])))


def speedup(result: Mapping[str, Any], variant: str, unit: str, genome: str = GENOME) -> float | None:
    """The speed-up of the genome over the optimizer that first reaches the same accuracy.

    Args:
        result: `steps` and `curves`.
        variant: the optimizers' network, `"plain"` or `"normalized"`.
        unit: `"steps"` or `"seconds"`.
        genome: name of the genome's curve.

    Example:

    >>> genome = {"accuracy": [[0.1, 0.5, 0.7]], "seconds": [0.0, 3.0, 6.0]}
    >>> other = {"accuracy": [[0.1, 0.3, 0.6]], "seconds": [0.0, 1.0, 2.0], "optimizer": "SGD", "network": "plain"}
    >>> result = {"steps": [0, 1, 2], "curves": {"genome": genome, "SGD 1": other}}
    >>> round(speedup(result, "plain", "steps"), 2), round(speedup(result, "plain", "seconds"), 2)
    (1.49, 0.5)
    """
    own, others = result["curves"][genome], candidates(result, variant).values()
    ours, theirs = _mean(own), np.max([_mean(one) for one in others], axis=0)
    low, high = max(ours[:2].max(), theirs[:2].max()), min(ours.max(), theirs.max())
    if len(ours) < 3 or low >= high:
        return None

    def time(curve: Mapping[str, Any], target: float) -> float:
        per_step = 1.0 if unit == "steps" else curve["seconds"][-1] / result["steps"][-1]
        return steps_to(result, curve, target) * per_step

    targets = np.linspace(low, high, TARGETS + 1)[1:]
    ratios = np.sort([min(time(one, target) for one in others) / time(own, target) for target in targets])
    cut = TARGETS // 4
    return float(np.mean(ratios[cut:-cut]))


def _mean(curve: Mapping[str, Any]) -> np.ndarray:
    """Mean accuracy over seeds, by score."""
    return np.mean(np.array(curve["accuracy"], np.float64), axis=0)


def _log(steps: Any) -> np.ndarray:
    return np.log1p(np.asarray(steps, np.float64))


def _at_edge(curves: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """Whether a curve's rate is the first or last one of several in its grid."""
    own = curves[name]
    rates = sorted({one["rate"] for one in curves.values() if one.get("optimizer") == own["optimizer"]})
    return len(rates) > 1 and own["rate"] in (rates[0], rates[-1])
