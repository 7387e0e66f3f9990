"""Reading a file of NumPy arrays that this package wrote: whole, or one line that says what is."""

import os
from collections.abc import Collection

import numpy as np

from siamese_jax.errors import UserError


def read_arrays(
    path: str | os.PathLike[str],
    what: str,
    needed: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, each verified by the checksum that the file has of it.

    Args:
      path: of the file.
      what: it should be, for the message.
      needed: names that must be there.
      wanted: those to read, as far as they are there; None for all.

    Raises:
      UserError: it is damaged, lacks an array, or is something else.
      FileNotFoundError: there is no such file.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if lost := {*needed} - {*file.files}:
                raise ValueError(f"it has no {min(lost)}")
            return {n: file[n] for n in file.files if wanted is None or n in wanted}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy report damage by more kinds than one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no {what}, or is damaged ({reason}); make it again") from None
