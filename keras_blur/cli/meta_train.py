"""`keras-blur meta-train`: meta-learning on images, toy functions or few-shot episodes.

`--method` selects what is learned: a genome, or the outer parameters of another learner.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_blur import backend, genomes, learners, meta, tasks
from keras_blur.cli.common import define_data_flags, whole_numbers
from keras_blur.cli.flags import Flags, When, unless_value, with_any, with_value, without
from keras_blur.cli.outputs import continued, history_of, interrupted, left_alone, of_same_run, read_json, write_json, wrote
from keras_blur.core.genome import Genome
from keras_blur.core.rule import Rule
from keras_blur.files import exists, save
from keras_blur.models.networks import NETWORKS, activation_of, builder

USAGE = "[flags]"
EXAMPLES = (
    "--epochs 32 --genome mine.json --checkpoint mine.weights.h5",
    "--functions xor,circle,blobs3 --hidden 20 --estimator cma --fitness loss --genome toy.json",
    "--network lenet,mlp --sizes 12,20 --data mnist --data_dir DIR --genome conv.json",
    "--method maml --ways 5 --shots 1 --data omniglot --data_dir DIR --model maml.keras",
)

ESTIMATORS: dict[str, Any] = {
    "unroll": meta.Unroll,
    "truncated": meta.TruncatedUnroll,
    "es": meta.ES,
    "pes": meta.PES,
    "cma": meta.Evolution,
    "warpgrad": meta.WarpGrad,
    "warpgrad_offline": meta.OfflineWarpGrad,
}

# Normalised sums in both passes and synapses of unit norm, as in sections 3.4 and C.6 of the paper.
RULE: dict[str, Any] = {
    "last_activation": "linear",
    "normalize_activations": "both",
    "normalize_synapses": "stored",
    "batch_reduction": "mean",
}


METHODS = ("blur", "maml", "prototypes", "neural_process", "warp", "online")
# Default numbers of unrolled steps and trajectory loss weights. Some learners need only one pass
# over the support.
_UNROLL = {"blur": ["10"], "maml": ["5"], "prototypes": ["1"], "neural_process": ["1"], "warp": ["20"], "online": ["4"]}
_TRAJECTORY_LOSS_WEIGHT = {"blur": 1.0}

AUGMENTATIONS = {
    "labels": tasks.LabelPermutation,
    "classes": tasks.ClassResample,
    "rotation": tasks.LabelRotation,
    "offset": lambda: tasks.LabelOffset(-1.0, 1.0),
}
_SYNTHETIC = ("pose", "sines", "classes", "remember")


_IMAGES = [without("functions", "synthetic")]
_WHOLE_SETS = [without("functions", "synthetic", "ways")]
_FEW_SHOT = [
    When("with --ways or --synthetic=classes", lambda flag: flag["ways"] or flag["synthetic"] == "classes", ("synthetic",))
]
_FIRST_ORDER = When(
    "with --method=maml under --estimator=unroll or truncated, or with --estimator=warpgrad or warpgrad_offline",
    lambda flag: (
        flag["estimator"].startswith("warpgrad")
        or (flag["method"] == "maml" and flag["estimator"] in ("unroll", "truncated"))
    ),
    ("method", "estimator"),
)
_DENSE = When(
    "with mlp in --network or with --method=warp",
    lambda flag: flag["method"] == "warp" or "mlp" in flag["network"],
    ("network",),
)
_LOSS_COUNTS = When(
    "with --fitness=loss under --estimator=cma, unless it is 0",
    lambda flag: flag["estimator"] != "cma" or flag["fitness"] == "loss" or not flag["trajectory_loss_weight"],
    ("estimator", "fitness"),
)
_QUERY_LOSS = When(
    "with --fitness=loss under --estimator=cma",
    lambda flag: flag["estimator"] != "cma" or flag["fitness"] == "loss",
    ("estimator", "fitness"),
)
_OUTPUTS = ("genome", "model", "checkpoint", "json", "csv", "tensorboard")
_BLUR, _OTHERS = [with_value("method", "blur")], [unless_value("method", "blur")]


def _takes(field: str) -> list[When]:
    """The condition that the estimator takes this argument."""
    takers = [name for name, kind in ESTIMATORS.items() if field in {one.name for one in dataclasses.fields(kind)}]
    return [with_value("estimator", *takers)]


def define_flags(flags: Flags) -> None:
    """Defines the command's flags."""
    flags.group("Tasks")
    define_data_flags(flags, _IMAGES)
    flags.words("functions", [], "Toy tasks instead of --data, one task family for each number of outputs.")
    flags.choice("synthetic", None, _SYNTHETIC, "Synthetic tasks instead of --data.")
    flags.integer("ways", None, "Few-shot episodes of --data with this number of classes.", least=2)
    flags.integer("shots", 1, "Examples of each class in a few-shot episode.", least=1, when=_FEW_SHOT)
    flags.switch(
        "exclusive", True, "Few-shot: draw any classes in any order; otherwise use fixed groups of classes.", _FEW_SHOT
    )
    flags.string(
        "group", None, "Few-shot: feature common to all classes of an episode, such as alphabet.", [with_any("ways")]
    )
    flags.words("sizes", [], "Image sizes, one task family each; empty leaves images unchanged.", _IMAGES)
    flags.words("project", [], "Output sizes of random projections of the images, one family each.", when=_WHOLE_SETS)
    flags.switch("permute", False, "Whether to permute the pixels in each episode.", _WHOLE_SETS)
    flags.switch("relabel", True, "Whether to permute the classes in each episode.", [without("synthetic", "ways")])
    flags.words("augment", [], f"Augmentations of an episode's labels: {', '.join(AUGMENTATIONS)}.")
    flags.group("Learner")
    flags.choice("method", "blur", METHODS, "The learner; blur learns with a genome.")
    flags.words(
        "network",
        ["mlp"],
        "Networks: mlp (see --hidden), lenet, resnet20, or .keras files; with --method=blur, a step uses one of several.",
        when=[unless_value("method", "warp", "online")],
    )
    flags.repeated(
        "hidden",
        ["64,64"],
        "Units of the hidden layers; with --method=blur, repeat for several networks.",
        [unless_value("method", "online"), _DENSE],
    )
    flags.integer("states", None, "States of a neuron; by default those of --start, else 2.", least=2, when=_BLUR)
    flags.words("rule", [], "Options that change the rule, such as oja=weights,update_decay=power.", _BLUR)
    flags.number(
        "inner_learning_rate", 0.1, "Learning rate of the inner SGD.", least=0.0, when=[with_value("method", "maml", "warp")]
    )
    flags.string(
        "start", None, "Name or file of an initial genome, whose rule --rule can change; else file of an initial model."
    )
    flags.words(
        "learn",
        [],
        "The genome's arrays to learn; the others stay those of --start. By default all.",
        [with_any("start"), *_BLUR],
    )
    flags.group("Outer learning")
    flags.choice(
        "estimator",
        None,
        sorted(ESTIMATORS),
        "Estimator of the outer gradient, or cma; by default unroll or warpgrad.",
    )
    flags.words(
        "unroll", None, "Unrolled steps of each stage; by default 10 (blur), 5 (maml), 20 (warp), 4 (online), else 1."
    )
    flags.choice(
        "start_objective", "leap", meta.STARTS, "How initial weights are learned.",
        [with_value("estimator", "warpgrad", "warpgrad_offline")],
    )  # fmt: skip
    flags.switch("first_order", False, "Whether the outer gradient treats inner gradients as constants.", [_FIRST_ORDER])
    flags.integer(
        "episode_steps",
        100,
        "Steps of an episode, divided into truncation windows of --unroll.",
        least=1,
        when=_takes("episode_steps"),
    )
    flags.integer("antithetic_pairs", 16, "Antithetic pairs of perturbations.", least=1, when=_takes("antithetic_pairs"))
    flags.integer("population", 80, "Genomes per generation.", least=4, when=_takes("population"))
    flags.number(
        "sigma",
        None,
        "Standard deviation of perturbations (es, pes; by default 0.05) or of the first generation (cma; by default 0.3).",
        when=_takes("sigma"),
    )
    flags.choice(
        "fitness",
        "accuracy",
        meta.FITNESSES,
        "Fitness of cma; speed is the accuracy averaged over steps 1, 2, 4, ... and the last.",
        _takes("fitness"),
    )
    flags.choice(
        "loss",
        "auto",
        meta.LOSSES,
        "Query loss; auto is cross-entropy, squared for values, or binary for patterns, which take no other.",
        [_QUERY_LOSS],
    )
    flags.switch(
        "recompute",
        False,
        "Whether to recompute the unrolled steps, which saves memory.",
        [with_value("estimator", "unroll", "truncated")],
    )
    flags.integer("devices", 1, "Devices to split tasks, members or candidates over; on a CPU, virtual ones.", least=1)
    flags.switch("jit_compile", True, "Whether to compile with XLA: a slower start, then faster on small networks.")
    flags.number(
        "trajectory_loss_weight",
        None,
        "Weight of the trajectory loss, added to the query loss; by default 1 for blur, else 0.",
        least=0.0,
        when=[_LOSS_COUNTS],
    )
    gradient = [unless_value("estimator", "cma")]
    flags.integer(
        "members", None, "Independent members trained side by side; by default 4 for blur, else 1.", 1, when=gradient
    )
    flags.integer("meta_batch_size", 1, "Episodes per meta-step.", least=1)
    flags.integer("batch_size", None, "Examples per support batch; by default 64, few-shot all, patterns 1.", least=1)
    flags.integer("query_size", 128, "Query examples.", least=1)
    flags.number("learning_rate", 3e-3, "Learning rate of the outer Adam.", least=0.0, when=gradient)
    flags.number("clipnorm", 1.0, "Maximum gradient norm of a member; 0 disables clipping.", least=0.0, when=gradient)
    flags.integer("epochs", 20, "Epochs, divided evenly between the stages.", least=1)
    flags.integer("steps_per_epoch", 100, "Meta-steps per epoch.", least=1)
    flags.integer("validate", 0, "Validation episodes per task family after each epoch; 0 for none.", least=0)
    flags.integer("seed", 0, "Random seed.", least=0)
    flags.group("Outputs")
    flags.output("genome", "genome.json", "File for the best genome, written after each epoch", (".json",), _BLUR)
    flags.output("model", "model.keras", "File for the best model, written after each epoch", (".keras",), _OTHERS)
    flags.output(
        "checkpoint", None, "File written after each epoch, from which training resumes.", (".weights.h5",), resumed=True
    )
    flags.output("json", None, "File for the history.", (".json",))
    flags.output("csv", None, "File for each epoch's numbers.", (".csv",))
    flags.string("tensorboard", None, "Folder for TensorBoard.")


_READERS: dict[str, Callable[[str], Any]] = {
    "bool": lambda value: {"true": True, "false": False}[value.lower()],
    "int": int,
    "float": float,
}


def parse_rule(texts: Sequence[str], **options: Any) -> Rule:
    """Builds a rule from `name=value` strings on top of the given options."""
    kinds = {field.name: str(field.type).partition(" ")[0] for field in dataclasses.fields(Rule)}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in kinds:
            raise ValueError(f"--rule must be option=value pairs of {', '.join(kinds)}. Received: {text!r}")
        try:
            options[name] = _READERS.get(kinds[name], str)(value)
        except (KeyError, ValueError) as error:
            raise ValueError(f"--rule: {name} cannot be {value!r}") from error
    return Rule(**options)


def complete(flag: dict[str, Any], given: set[str]) -> None:
    """Fills in defaults that depend on the method, and refuses flags that exclude each other."""
    method = flag["method"]
    flag["unroll"] = flag["unroll"] or _UNROLL[method]
    flag["estimator"] = flag["estimator"] or ("warpgrad" if method == "warp" else "unroll")
    flag["members"] = flag["members"] or (4 if method == "blur" else 1)
    if flag["trajectory_loss_weight"] is None:
        flag["trajectory_loss_weight"] = _TRAJECTORY_LOSS_WEIGHT.get(method, 0.0)
    if sum([bool(flag["functions"]), flag["synthetic"] is not None, flag["ways"] is not None]) > 1:
        raise ValueError("--functions, --synthetic and --ways exclude each other")
    if "relabel" in given and flag["relabel"]:
        values = [name for name in flag["functions"] if tasks.functions(name).kind != "classes"]
        if values:
            raise ValueError(f"--relabel applies only to --functions of classes. Received: {', '.join(values)}")


def run(flag: dict[str, Any], positional: Sequence[str], scope: Any = None) -> int:
    """Meta-trains, prints the scores of the members, and writes the best member.

    Ctrl-C ends training and keeps what was learned.

    Args:
        flag: values of all flags, with defaults filled in.
        positional: unused.
        scope: scope of a `tf.distribute` strategy, or `None`.
    """
    del positional
    if flag["devices"] == 1:
        return _run(flag, scope or contextlib.nullcontext())
    with backend.on_devices(flag["devices"]) as of_devices:
        return _run(flag, of_devices)


def _run(flag: dict[str, Any], scope: Any) -> int:
    """`run` in the scope of its devices."""
    method = flag["method"]
    unrolls, sizes = whole_numbers("unroll", flag["unroll"]), whole_numbers("sizes", flag["sizes"])
    if flag["epochs"] < len(unrolls):
        raise ValueError(
            f"--epochs must be at least the number of stages of --unroll, {len(unrolls)}. "
            f"Received: --epochs={flag['epochs']}"
        )
    estimator = _estimator(flag, unrolls[0])
    if isinstance(estimator, meta.Estimator) and estimator.carries and len(set(unrolls)) > 1:
        raise ValueError(
            f"--unroll must be one number with --estimator={flag['estimator']}, which carries learners from one "
            f"meta-step to the next. Received: --unroll={','.join(flag['unroll'])}"
        )
    earlier = read_json(flag["json"])
    families = _families(flag, sizes)
    if flag["batch_size"] is None:
        flag["batch_size"] = _batch_size(families[0], flag["shots"])
    families = [_augmented(flag, one) for one in families]
    learner, start = _learners(flag, families[0])
    output = flag["genome"] if method == "blur" else flag["model"]
    with scope:
        trainer = meta.MetaTrainer(
            families,
            learner,
            estimator,
            members=1 if flag["estimator"] == "cma" else flag["members"],
            meta_batch_size=flag["meta_batch_size"],
            batch_size=flag["batch_size"],
            query_size=flag["query_size"],
            clipnorm=flag["clipnorm"] or None,
            start=start,
            seed=flag["seed"],
        )
        optimizer = None if flag["estimator"] == "cma" else keras.optimizers.Adam(flag["learning_rate"])
        trainer.compile(optimizer, jit_compile=flag["jit_compile"])
    length = flag["epochs"] // len(unrolls)
    stages = [(index * length, steps) for index, steps in enumerate(unrolls)]
    callbacks: list[keras.callbacks.Callback] = [meta.UnrollCurriculum(stages)]
    if flag["validate"]:
        last = unrolls[-1] if len(unrolls) > 1 else None
        callbacks.append(meta.MetaValidate(families, episodes=flag["validate"], steps=last))
    callbacks.append(meta.SaveLearned(output))
    going_on = bool(flag["checkpoint"]) and exists(flag["checkpoint"])
    writes_files = trainer.runner.writes_files  # of several processes, one does
    if flag["csv"] and writes_files:
        callbacks.append(keras.callbacks.CSVLogger(flag["csv"], append=going_on))
    if flag["tensorboard"] and writes_files:
        callbacks.append(tensorboard(flag["tensorboard"]))
    log = keras.callbacks.History()
    stopped = False
    begin = time.perf_counter()
    before = int(backend.numbers_of(trainer.meta_step))
    try:
        trainer.fit(flag["epochs"], flag["steps_per_epoch"], checkpoint=flag["checkpoint"], callbacks=[*callbacks, log])
    except KeyboardInterrupt:
        stopped = True
    seconds = time.perf_counter() - begin
    if stopped and int(backend.numbers_of(trainer.meta_step)) == before:
        return interrupted("no meta-step was done, so nothing was kept")
    if not writes_files:
        return interrupted("another process keeps what was learned") if stopped else 0
    writes = trainer.sound or not exists(output)
    if writes:  # even if the checkpoint was complete
        save(trainer.learned, output)
    scores = backend.numbers_of(trainer.member_score).tolist()
    quality = "query accuracy" if trainer.quality == "accuracy" else "R squared"
    print(f"\nmeta-training: {seconds:.0f} s; running {quality} of the members: "
          f"{', '.join(f'{score:.3f}' for score in scores)}; best: {trainer.best}")  # fmt: skip
    if writes:
        wrote(output)
    else:
        print(f"left {output} unchanged: no member was finite in the last step")
    found = history_of(log)
    if flag["json"] and (found["epochs"] or not left_alone(flag["json"], going_on)):
        earlier = of_same_run(earlier, flag, _OUTPUTS) if going_on else None
        found = continued(earlier, {"seconds": seconds, **found})
        document: dict[str, Any] = {"flags": flag, "scores": scores, **found}
        write_json(flag["json"], {**document, "partial": True} if stopped else document)
    if log.history:
        for name in ("checkpoint", "csv", "tensorboard"):
            if flag[name] and exists(flag[name]):
                wrote(flag[name])
    return interrupted("no member was finite, so nothing was kept") if stopped else 0


def _learners(flag: dict[str, Any], of: tasks.Tasks) -> tuple[list[learners.MetaLearner], Any]:
    """The selected learners and their initial outer parameters; `None` for random ones."""
    networks = [tuple(whole_numbers("hidden", text.split(","))) for text in flag["hidden"]]
    if flag["method"] == "blur":
        start = genomes.load(flag["start"]) if flag["start"] else None
        if start and flag["states"] not in (None, start.rule.states):
            raise ValueError(
                f"--states must be {start.rule.states}, as in the genome of --start. Received: --states={flag['states']}"
            )
        axis = "units" if flag["batch_size"] == 1 else "batch"  # nothing is left of one example that is its own mean
        own = {**RULE, "states": flag["states"] or 2, "normalization_axis": axis}
        options = start.rule.get_config() if start else own
        rule = parse_rule(flag["rule"], **options)
        start = start.with_rule(rule) if start else None
        fixed = _fixed(start, flag["learn"]) if start and flag["learn"] else None
        return _networks(flag["network"], networks, rule, fixed), start
    if len(networks) > 1:
        raise ValueError(
            f"--hidden must be given once with --method={flag['method']}. Received: {len(networks)} times --hidden"
        )
    if len(flag["network"]) > 1:
        raise ValueError(
            f"--network must be one network with --method={flag['method']}. Received: {','.join(flag['network'])}"
        )
    hidden, loss = networks[0], "squared" if of.kind == "values" else "cross_entropy"
    sgd = keras.optimizers.SGD(flag["inner_learning_rate"])
    if flag["method"] == "warp":
        model, warps = learners.warped(of.features, hidden, of.outputs, seed=flag["seed"])
        return [learners.Warp(model, warps, sgd, loss=loss)], flag["start"]
    if flag["method"] == "online":
        return [learners.OnlineRule(units=of.outputs)], flag["start"]
    network = hidden if flag["network"] == ["mlp"] else _build(flag["network"][0])
    if flag["method"] == "maml":
        return [learners.MAML(sgd, network, loss=loss, first_order=flag["first_order"])], flag["start"]
    kinds = {"prototypes": learners.Prototypes, "neural_process": learners.NeuralProcess}
    return [kinds[flag["method"]](network)], flag["start"]


def _fixed(start: Genome, learned: Sequence[str]) -> dict[str, Any]:
    """The arrays of a genome that are not to be learned."""
    if unknown := set(learned) - set(start.arrays):
        raise ValueError(f"--learn must be some of {', '.join(start.arrays)}. Received: {', '.join(sorted(unknown))}")
    return {name: value for name, value in start.arrays.items() if name not in learned}


def _networks(
    names: Sequence[str], hidden: Sequence[tuple[int, ...]], rule: Rule, fixed: Any = None
) -> list[learners.MetaLearner]:
    """The learners of the selected networks."""
    found: list[learners.MetaLearner] = []
    for name in names:
        if name == "mlp":
            found += [learners.Blur(units, rule, fixed=fixed) for units in hidden]
            continue
        build = functools.partial(_build(name), activation=activation_of(rule.forward_activation))
        found.append(learners.Blur(build, rule, fixed=fixed))
    return found


def _build(name: str) -> Callable[..., Any]:
    """A function that builds a network by name."""
    if name not in NETWORKS and not name.endswith(".keras"):
        raise ValueError(f"--network must be some of mlp, lenet, resnet20 or .keras files. Received: {name}")
    return builder(name)[1]


def _batch_size(of: tasks.Tasks, shots: int) -> int:
    """The default size of a support batch."""
    if of.kind == "bits":
        return 1  # patterns are stored one at a time
    return of.outputs * shots if hasattr(of, "shots") else 64


def _augmented(flag: dict[str, Any], of: tasks.Tasks) -> tasks.Tasks:
    """Applies the selected augmentations to tasks."""
    unknown = set(flag["augment"]) - set(AUGMENTATIONS)
    if unknown:
        raise ValueError(f"--augment must be some of {', '.join(AUGMENTATIONS)}. Received: {', '.join(sorted(unknown))}")
    if not flag["augment"]:
        return of
    return tasks.augment(of, tasks.Compose([AUGMENTATIONS[name]() for name in flag["augment"]]))


def _families(flag: dict[str, Any], sizes: Sequence[int]) -> list[tasks.Tasks]:
    """The selected task distributions."""
    if flag["synthetic"] == "classes":
        return [tasks.classes(shots=flag["shots"], exclusive=flag["exclusive"])]
    if flag["synthetic"]:
        made: dict[str, Any] = {"pose": tasks.pose, "sines": tasks.sines, "remember": tasks.remember}
        return [made[flag["synthetic"]]()]
    if flag["functions"]:
        by_outputs: dict[int, list[str]] = {}
        for name in flag["functions"]:
            by_outputs.setdefault(tasks.functions(name).outputs, []).append(name)
        kinds = {tasks.functions(names).kind for names in by_outputs.values()}
        relabel = flag["relabel"] and kinds == {"classes"}
        return [tasks.functions(names, relabel=relabel) for names in by_outputs.values()]
    sides: list[int | None] = [*sizes] or [None]
    if flag["ways"]:
        few = {"exclusive": flag["exclusive"], "group": flag["group"], "data_dir": flag["data_dir"]}
        return [tasks.episodes(flag["data"], flag["ways"], flag["shots"], size=side, **few) for side in sides]
    options = {"relabel": flag["relabel"], "permute": flag["permute"], "data_dir": flag["data_dir"]}
    plain = [tasks.images(flag["data"], size=side, **options) for side in sides]
    projections = whole_numbers("project", flag["project"])
    return [*plain, *(tasks.images(flag["data"], size=sides[-1], project=rows, **options) for rows in projections)]


def _estimator(flag: dict[str, Any], steps: int) -> meta.Estimator | meta.Evolution:
    """The selected estimator."""
    kind = ESTIMATORS[flag["estimator"]]
    known = {field.name for field in dataclasses.fields(kind)} - {"steps", "kind", "start"}
    options = {name: value for name, value in flag.items() if name in known and value is not None}
    if issubclass(kind, meta.WarpGrad):
        options |= {"order": "first" if flag["first_order"] else "exact", "start": flag["start_objective"]}
    return kind(steps, **options)


def tensorboard(folder: str) -> keras.callbacks.Callback:
    """Keras's TensorBoard callback.

    Raises:
        ImportError: if tensorboard is not installed; the message has the install command.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard")
    return keras.callbacks.TensorBoard(folder, write_graph=False)
