"""The backend's functions on TensorFlow; see `keras_blur.backend`."""
