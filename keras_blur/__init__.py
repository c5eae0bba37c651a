"""Networks that learn without gradients, with a genome: BLUR for Keras.

>>> import keras_blur as kb
>>> kb.genomes.backprop().rule.states
2
"""

import importlib.util as _util
import json as _json
import os as _os
import sys as _sys

# The command line's own process, as a script or as `python -m`: hide TensorFlow's start-up
# messages.
if _os.path.basename(_sys.argv[0]) in ("keras-blur", "-m"):
    _os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_INSTALL = {"tensorflow": "'keras_blur[cpu]' (or [gpu], [tpu])", "jax": "'keras_blur[jax]'"}


def _check_backend(name: str) -> None:
    """Raises an `ImportError` unless the backend is one of ours and installed."""
    if name not in _INSTALL:
        raise ImportError(
            f"keras_blur needs the TensorFlow or the JAX backend of Keras; the backend is {name!r}. Set the environment "
            "variable KERAS_BACKEND to tensorflow or jax before Keras is imported."
        )
    if _util.find_spec(name) is None:
        other = "" if name == "jax" else "; or, for JAX, pip install 'keras_blur[jax]' and set KERAS_BACKEND=jax"
        raise ImportError(f"keras_blur needs {name}, which is not installed: pip install {_INSTALL[name]}{other}.")


def _chosen() -> str:
    """The backend that Keras will import: of the environment, of its configuration file, or its
    default."""
    if "KERAS_BACKEND" in _os.environ:
        return _os.environ["KERAS_BACKEND"]
    home = _os.environ.get("KERAS_HOME", _os.path.join(_os.path.expanduser("~"), ".keras"))
    try:
        with open(_os.path.join(home, "keras.json"), encoding="utf-8") as file:
            return str(_json.load(file).get("backend", "tensorflow"))
    except (OSError, ValueError):
        return "tensorflow"


_check_backend(_chosen())  # before Keras tries to import one that is missing

import keras as _keras

_check_backend(_keras.backend.backend())  # Keras may have been imported before

from keras_blur import bilevel, genomes, layers, learners, meta, report, tasks
from keras_blur._version import __version__
from keras_blur.core import random
from keras_blur.core.genome import Genome
from keras_blur.core.rule import Rule
from keras_blur.models import Model, Sequential, convert

__all__ = [
    "Genome",
    "Model",
    "Rule",
    "Sequential",
    "__version__",
    "bilevel",
    "convert",
    "genomes",
    "layers",
    "learners",
    "meta",
    "random",
    "report",
    "tasks",
]
