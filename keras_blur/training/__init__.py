"""What both trainers share: the outer loop with the duties of Keras's `fit`, checkpoints, the settings of a run."""
