"""Models whose files are written atomically."""

from __future__ import annotations

import os
from typing import Any

import keras

from keras_blur import files


class WholeFiles(keras.Model):
    """A Keras model that saves atomically: to a temporary file, which is then renamed."""

    def save(self, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any) -> None:
        """Saves the model, as in Keras, but atomically.

        Args:
            filepath: a path that ends in `.keras`.
            overwrite: as in Keras.
            zipped: as in Keras; `False` writes a folder.
            **kwargs: as in Keras.

        Raises:
            ValueError: if the path has another ending.
            OSError: if the file cannot be written. An existing file is then unchanged.
        """
        path = os.fspath(filepath)
        apart = zipped is False or path.startswith("hf://")
        if not apart and not path.endswith(".keras"):
            raise ValueError(f"`filepath` must end in '.keras'. Received: filepath={path!r}")
        if apart or (not overwrite and files.exists(path)):
            super().save(filepath, overwrite, zipped, **kwargs)
            return
        with files.replacing(path) as temporary:
            super().save(temporary, zipped=zipped, **kwargs)

    def save_weights(self, filepath: Any, overwrite: bool = True, max_shard_size: float | None = None) -> None:
        """Saves the weights, as in Keras, but atomically.

        Args:
            filepath: a path that ends in `.weights.h5`.
            overwrite: as in Keras.
            max_shard_size: as in Keras.

        Raises:
            ValueError: if the path has another ending.
            OSError: if the file cannot be written. An existing file is then unchanged.
        """
        path = os.fspath(filepath)
        if max_shard_size is not None or (not overwrite and files.exists(path)):
            super().save_weights(filepath, overwrite, max_shard_size)
            return
        if not path.endswith(".weights.h5"):
            raise ValueError(f"`filepath` must end in '.weights.h5'. Received: filepath={path!r}")
        with files.replacing(path) as temporary:
            super().save_weights(temporary)
