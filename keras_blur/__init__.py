"""Networks that learn without gradients, by a genome: BLUR for Keras.

>>> import keras_blur as kb
>>> kb.genomes.backprop().rule.states
2
"""

import importlib.util as _util
import os as _os
import sys as _sys

# The command line's own process, as a script or as `python -m`: hide TensorFlow's start-up messages.
if _os.path.basename(_sys.argv[0]) in ("keras-blur", "-m"):
    _os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if _util.find_spec("tensorflow") is None:
    raise ImportError(
        "keras_blur needs TensorFlow, which is not installed: pip install 'keras_blur[cpu]' (or [gpu], [tpu])."
    )

_BACKEND = (
    "keras_blur needs the TensorFlow backend of Keras; the backend is {!r}. "
    "Set the environment variable KERAS_BACKEND=tensorflow before Keras is imported."
)
if _os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":  # before Keras tries to import that backend
    raise ImportError(_BACKEND.format(_os.environ["KERAS_BACKEND"]))

import keras as _keras

if _keras.backend.backend() != "tensorflow":  # from its configuration file
    raise ImportError(_BACKEND.format(_keras.backend.backend()))

from keras_blur import bilevel, genomes, layers, learners, meta, report, tasks
from keras_blur._version import __version__
from keras_blur.core.genome import Genome
from keras_blur.core.rule import Rule
from keras_blur.models import Sequential
from keras_blur.models.convert import convert

__all__ = [
    "Genome",
    "Rule",
    "Sequential",
    "__version__",
    "bilevel",
    "convert",
    "genomes",
    "layers",
    "learners",
    "meta",
    "report",
    "tasks",
]
