"""XLA that compiles a step in half the time, for tests in which compiling is most of the work.

Its programs are slower and sum in another order, so they do for tests beside a tolerance or a run
of their own kind. What is claimed of the programs that users get (exact search, trunks beside
their oracles, memory, speed, the README) is tested with XLA as it comes.
"""

import functools

import jax

# The older way to write a fusion's code writes much less of it where nothing optimises it.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
# The same for XLA_FLAGS, of a process.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
