"""The callback that checkpoints a training run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras

from keras_blur import files
from keras_blur.training import settings


class Checkpoint(keras.callbacks.Callback):
    """Writes a checkpoint after each epoch, with everything needed to resume. `fit` adds it.

    Args:
        path: a `.weights.h5` file.
        made_with: the settings of the run, stored in the file.
    """

    def __init__(self, path: str, made_with: Mapping[str, Any]):
        super().__init__()
        self.path, self.made_with = path, dict(made_with)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.write()

    def write(self) -> None:
        """Writes the checkpoint now."""
        if self.model.runner.writes_files:
            memory = files.Memory(os.path.basename(self.path))
            self.model.save_weights(memory)
            settings.write(self.path, memory, self.made_with)
