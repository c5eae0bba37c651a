"""The backend's functions on JAX; see `keras_blur.backend`."""
