"""One experiment. Empty, so that the step imports without ml_collections."""
