"""The architectures, one a file; `table` lists them all."""
