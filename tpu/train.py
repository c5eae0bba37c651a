"""Meta-trains on a Cloud TPU: `keras-blur meta-train`, laid over all cores.

    python tpu/train.py --tpu local --out gs://BUCKET/RUN --data mnist --meta_batch_size 32

It takes the flags of `keras-blur meta-train`, and where the TPU is. On JAX, the default, tasks are
laid over the cores of a `keras.distribution.DataParallel`; every host of a slice runs this command.
`--backend tensorflow` trains under `TPUStrategy`. What a run writes goes to `--out`, a folder or a
bucket: the checkpoint after each epoch, the genome, the history, logs for TensorBoard where that is
installed. On SIGTERM the checkpoint is written after the present step and the process ends with
status 143; the same command then goes on from it, to the same result. `--tpu none` runs the whole
path without a TPU. README.md here is the run book.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # how a TPU VM shows its chips
BACKENDS = ("jax", "tensorflow")


def backend_of(arguments: Sequence[str]) -> str:
    """The backend that a command line asks for: Keras must know it before it is imported."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--backend", "-backend"):
            return value if equals else "".join(arguments[place + 1 : place + 2])
    return BACKENDS[0]


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = backend_of(sys.argv[1:])
if not any(glob.glob(pattern) for pattern in DEVICES):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu waits for Google's metadata server when it is imported

import keras

from keras_blur import cli
from keras_blur.cli import meta_train
from keras_blur.cli.flags import Flags, When, with_value
from keras_blur.files import make_folder

USAGE = "[flags]"
EXAMPLES = (
    "--tpu local --out gs://BUCKET/RUN --data mnist --meta_batch_size 32",
    "--tpu none --out run --functions xor --hidden 8 --epochs 2",
)

# What a run writes, by flag.
FILES = {
    "checkpoint": "run.weights.h5", "genome": "genome.json", "model": "model.keras", "csv": "history.csv",
    "json": "result.json",
    **({"tensorboard": "logs"} if importlib.util.find_spec("tensorboard") else {}),
}  # fmt: skip


def scope_of(name: str, zone: str | None = None, project: str | None = None) -> Any:
    """The scope in which a trainer uses a TPU, its system initialised; one that changes nothing for
    `"none"`.

    Raises:
        ValueError: if there is no such TPU, or the backend cannot use it.
    """
    if name == "none":
        return contextlib.nullcontext()
    if name == "local" and not any(glob.glob(pattern) for pattern in DEVICES):
        raise ValueError(
            f"--tpu local needs a TPU in this machine; there is none ({', '.join(DEVICES)}). On a TPU VM, look at its state "
            "with `gcloud compute tpus tpu-vm describe`; elsewhere use --tpu none."
        )
    return _of_jax(name) if keras.backend.backend() == "jax" else _of_tensorflow(name, zone, project)


def _of_jax(name: str) -> Any:
    jax = importlib.import_module("jax")
    if name != "local":
        raise ValueError(f"--tpu must be local or none on JAX, which runs on the hosts of a TPU. Received: --tpu={name}")
    try:
        if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):  # one of several hosts of a slice
            jax.distributed.initialize()
        devices = keras.distribution.list_devices("tpu")
    except RuntimeError as error:
        raise ValueError(
            f"--tpu {name}: this JAX ({jax.__version__}) finds no TPU: pip install 'jax[tpu]'. It said: {error}"
        ) from error
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    print(f"TPU {name}: {len(devices)} cores", flush=True)
    return contextlib.nullcontext()


def _of_tensorflow(name: str, zone: str | None, project: str | None) -> Any:
    tf = importlib.import_module("tensorflow")
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name, zone=zone, project=project)
        if name != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        strategy = tf.distribute.TPUStrategy(resolver)
    except tf.errors.NotFoundError as error:
        raise ValueError(
            f"--tpu {name}: this TensorFlow ({tf.__version__}) has no TPU support: install tpu/requirements-vm.txt, in an "
            f"environment without tensorflow-cpu. It said: {error.message.splitlines()[0]}"
        ) from error
    except (tf.errors.OpError, IndexError, RuntimeError, OSError) as error:
        raise ValueError(f"--tpu {name} could not be initialised; see tpu/README.md. It said: {error}") from error
    print(f"TPU {name}: {strategy.num_replicas_in_sync} cores", flush=True)
    return strategy.scope()


def define_flags(flags: Flags) -> None:
    """Those of `keras-blur meta-train`, and where the TPU is."""
    meta_train.define_flags(flags)
    named = [When("with the name of a TPU in --tpu", lambda flag: flag["tpu"] not in ("none", "local"), ("tpu",))]
    flags.group("Device")
    flags.choice("backend", keras.backend.backend(), BACKENDS, "Backend of Keras; jax if none is named.")
    flags.string("tpu", "none", "'local' on a TPU VM, the name of a TPU, or 'none' for the CPU or GPU of this machine.")
    named.append(with_value("backend", "tensorflow"))
    flags.string("gcp_zone", None, "Zone of the TPU.", named)
    flags.string("gcp_project", None, "Project of the TPU.", named)
    flags.group("Outputs")
    flags.string("out", None, "Folder or bucket for what a run writes, except for files that other flags name.")


def complete(flag: dict[str, Any], given: set[str]) -> None:
    """Places what a run writes."""
    if out := flag["out"]:
        make_folder(out)  # of a bucket too: what cannot be written is known now, not after the first epoch
        for name, file in FILES.items():
            if name not in given:
                flag[name] = f"{out.rstrip('/')}/{file}"
    if flag["devices"] > 1 and flag["tpu"] != "none":
        raise ValueError(
            f"--devices must be 1 with a TPU, all of whose cores are used. Received: --devices={flag['devices']}"
        )
    meta_train.complete(flag, given)


def run(flag: dict[str, Any], positional: Sequence[str]) -> int:
    """Meta-trains there."""
    return meta_train.run(flag, positional, scope_of(flag["tpu"], flag["gcp_zone"], flag["gcp_project"]))


if __name__ == "__main__":
    sys.exit(cli.call(sys.modules[__name__], "tpu/train.py", "meta-train a genome on a TPU", sys.argv[1:]))
