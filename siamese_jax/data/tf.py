"""TensorFlow as this package uses it: quiet, for tf.data alone, and blind to the GPU."""

import contextlib
import os
from typing import Any


def tensorflow() -> Any:
    """The module `tensorflow`, with every GPU hidden from it: JAX needs all of their memory."""
    # Its start-up lines on standard error tell a user of tf.data nothing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    # A RuntimeError means that the user's own code has put TensorFlow to work already.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf
