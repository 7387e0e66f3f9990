"""Images to batches. The only package here that imports TensorFlow, and it never sees the GPU."""
