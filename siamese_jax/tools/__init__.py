"""The command line tools, one file each: `python -m siamese_jax TOOL --help`."""
