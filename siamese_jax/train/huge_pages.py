"""Memory in pages of 2 MiB, asked for before a program that trains begins.

A step of training makes large arrays and lets go of them, and the system hands their memory out
anew, page by page of 4 KiB: 290,000 page faults a step of ViT-S (48 images at 112 pixels), a fifth
of its time. Where Linux gives huge pages to programs that ask for them ("madvise"), glibc 2.35 asks
for every large array if a variable is set before the process starts; nothing inside the process can
do it later. So the program starts itself once more, before it has done anything.
https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
"""

import os
import sys
from pathlib import Path

VARIABLE, NAME = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str] | None:
    """The process's environment and the variable; None where it is set already, or does nothing."""
    set_already = os.environ.get(VARIABLE, "")
    if NAME in set_already or not (_on_demand() and _glibc() >= (2, 35)):
        return None
    both = ":".join(part for part in (set_already, f"{NAME}=1") if part)
    return {**os.environ, VARIABLE: both}


def begin_again() -> None:
    """Starts the process again with huge pages, if that is of any use; it must be its first act."""
    found = environment()
    if found and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], found)


def line() -> str | None:
    """What a run says of it, where glibc asks for them."""
    if f"{NAME}=1" not in os.environ.get(VARIABLE, ""):
        return None
    return f"large arrays are in huge pages of memory ({VARIABLE}={NAME}=1)"


def _on_demand() -> bool:
    try:
        return "[madvise]" in SWITCH.read_text()
    except OSError:  # another system
        return False


def _glibc() -> tuple[int, ...]:
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(map(int, version.split("."))) if library == "glibc" else ()
    except (AttributeError, ValueError, OSError):
        return ()
