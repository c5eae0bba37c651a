"""The learning rule on arrays: no Keras model, no backend of Keras by name."""
