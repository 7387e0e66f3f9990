"""Whose leaves a file holds: a trunk's, below which prefix, in how many copies; what is foreign."""

import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from siamese_jax.errors import UserError
from siamese_jax.trunks import table
from siamese_jax.trunks.parameters import PARAMETERS
from siamese_jax.weights.formats import Leaves
from siamese_jax.weights.namings import Scheme, names, same_size, schemes, shapes


class Fit(NamedTuple):
    """A file's leaves seen as a trunk's in one naming, below one prefix such as "module."."""

    naming: str
    scheme: Scheme
    form: str
    prefix: str
    wanted: dict[str, str]  # our leaf -> theirs
    missing: set[str]

    def knows(self, name: str) -> bool:
        """Whether a leaf is one that the trunk's files have and the trunk has no use for."""
        inside = name.startswith(self.prefix)
        return inside and bool(re.match(self.scheme.ignored, name.removeprefix(self.prefix)))


_COUNTERS = re.compile(r"(^|[./])(num_batches_tracked|n_averaged)$")
# Of several copies in one file: the averaged one, as timm and DINO evaluate it, before the one that
# was trained; but the trained one before a target that only followed it (MoCo's key encoder, BYOL).
_FIRST = {"ema", "teacher", "swa", "averaged", "average", "avg"}
_LAST = {"k", "key", "target", "momentum"}


def choose(
    leaves: Leaves, trunk: str, form: str | None, where: str, ignored: set[str]
) -> tuple[Fit, list[str], list[str]]:
    """The fit that most leaves have, lines on why, and the names of what else the file holds.

    Raises Mismatch if leaves are missing or unknown.
    """
    fits = find_fits(leaves, trunk, form)
    found = min(fits, key=lambda fit: len(fit.missing) / len(fit.wanted))
    copies = [fit for fit in fits if fit.naming == found.naming and not fit.missing]
    found, *others = sorted(copies, key=lambda fit: _order(fit, copies, leaves, trunk)) or [found]
    unknown, branches = _unknown(leaves, found, others)
    if found.missing or unknown:
        advice = _advice(found, unknown, ignored, leaves, trunk)
        file = shlex.quote(where)
        all_names = f"python -m siamese_jax weights verify {file} --trunk={trunk} --all"
        raise mismatch(
            f"{where} does not fit {trunk}",
            found.missing,
            unknown,
            f"{advice}; all names: {all_names}",
        )
    return found, [_choice(found, others)] if others else [], branches


def find_fits(leaves: Leaves, trunk: str, form: str | None = None) -> list[Fit]:
    """The file's leaves in every naming of the trunk, below every prefix that may be one."""
    known = schemes(trunk)
    likely = {
        naming: scheme
        for naming, scheme in known.items()
        if any(name.endswith("/kernel" if scheme.keras else ".weight") for name in leaves)
    }
    fits = []
    for naming, scheme in (likely or known).items():
        wanted = names(trunk, form or scheme.form, scheme)
        for prefix in [""] if scheme.keras else _prefixes(leaves, wanted):
            full = {ours: prefix + theirs for ours, theirs in wanted.items()}
            missing = set(full.values()) - leaves.keys()
            fits.append(Fit(naming, scheme, form or scheme.form, prefix, full, missing))
    return fits


def _prefixes(leaves: Leaves, wanted: Mapping[str, str]) -> list[str]:
    """What stands before the first or the last wanted name in the file, such as "backbone."."""
    listed = list(wanted.values())
    found = {
        key.removesuffix(name): None
        for name in (listed[0], listed[-1])
        for key in leaves
        if key.endswith(("." + name, "/" + name))
    }
    return ["", *found][:24]


def _order(fit: Fit, copies: list[Fit], leaves: Leaves, trunk: str) -> tuple[bool, bool, int]:
    """First by the trunk's own shapes, then by having nothing foreign, then by name."""
    others = [other for other in copies if other is not fit]
    words = set(re.split(r"[./_]", fit.prefix))
    rank = 0 if words & _FIRST else 2 if words & _LAST else 1
    return not _whole(fit, leaves, trunk), bool(_unknown(leaves, fit, others)[0]), rank


def _whole(fit: Fit, leaves: Leaves, trunk: str) -> bool:
    """Whether all leaves are there, and of the trunk's sizes."""
    sizes = shapes(trunk, fit.form)
    return not fit.missing and all(
        same_size(ours, leaves[name].size, sizes[ours]) for ours, name in fit.wanted.items()
    )


def _branch(name: str, scheme: Scheme) -> str:
    """The entry of a checkpoint that a leaf or a prefix is of; Keras's names have none."""
    return "" if scheme.keras else name.rpartition("/")[0]


def _unknown(leaves: Leaves, best: Fit, others: list[Fit]) -> tuple[set[str], list[str]]:
    """The leaves that belong to nothing, and the other entries of a checkpoint."""
    extra = leaves.keys() - set(best.wanted.values())
    own = _branch(best.prefix, best.scheme)
    outside = {name for name in extra if _branch(name, best.scheme) != own}
    copies = {name for fit in others for name in extra if _is_of(name, fit, best)}
    copies |= extra & {name for fit in others for name in fit.wanted.values()}
    unknown = {
        name
        for name in extra - outside - copies
        if not best.knows(name) and not _COUNTERS.search(name)
    }
    return unknown, sorted({_branch(name, best.scheme) or name for name in outside - copies})


def _is_of(name: str, fit: Fit, best: Fit) -> bool:
    """Whether a leaf, beside those that are wanted, belongs to another copy of the trunk."""
    apart = not best.prefix.startswith(fit.prefix) and name.startswith(fit.prefix)
    return apart or fit.knows(name)


def _choice(best: Fit, others: list[Fit]) -> str:
    copies = " and ".join(f"'{fit.prefix}'" for fit in others)
    return (
        f"of its {len(others) + 1} copies '{best.prefix}' is taken, not {copies} (averages come "
        f"first, then what was trained, then targets; for the other --ignore="
        f"'{_all_but(others[0], best)}')"
    )


def _all_but(wanted: Fit, other: Fit) -> str:
    """A pattern that leaves out one of two copies."""
    if other.prefix and not wanted.prefix.startswith(other.prefix):
        return f"^{re.escape(other.prefix)}"
    return f"^(?!{re.escape(wanted.prefix)})"


# What does not fit.


class Mismatch(UserError):
    """Leaves that a trunk lacks or does not know; `lines` has them all, as "- name", "+ name"."""

    def __init__(self, message: str, lines: list[str]):
        super().__init__(message)
        self.lines = lines


def mismatch(
    what: str, missing: Collection[str], unknown: Collection[str], advice: str
) -> Mismatch:
    """One line of counts, first names and advice."""
    lacking = [f"- {key}" for key in sorted(missing)]
    foreign = [f"+ {key}" for key in sorted(unknown)]
    counts = f"{len(lacking)} leaves are missing{_shown(lacking)}"
    counts += f", {len(foreign)} are unknown{_shown(foreign)}"
    return Mismatch(f"{what}: {counts}; {advice}", lacking + foreign)


def _shown(lines: list[str]) -> str:
    return f" ({first(lines)})" if lines else ""


def _advice(fit: Fit, unknown: set[str], ignored: set[str], leaves: Leaves, trunk: str) -> str:
    if ignored & fit.missing:
        return f"--ignore leaves out what {trunk} needs"
    whole = complete(leaves, trunk) if len(fit.missing) < 0.9 * len(fit.wanted) else []
    if fit.missing and trunk in whole:
        return f"its leaves are not those of the {fit.form} form: leave out --form"
    if whole and whole[0] != trunk:
        return f"its leaves are those of {whole[0]}: take that trunk"
    if len(fit.missing) > len(fit.wanted) / 2:
        naming = ", ".join(name for name in schemes(trunk) if "," not in name)
        return f"few are called as in {trunk}'s files of {naming}: it is of another network"
    if fit.missing:
        return "it is cut down, or of a changed network"
    below = f" below '{fit.prefix}'" if fit.prefix else ""
    stems = sorted({_stem(name, fit.wanted.values()) for name in unknown})
    pattern = "|".join(f"^{stem}" for stem in stems) if len(stems) < 8 else "REGEX"
    return (
        f"all of {trunk} is there{below}; where the unknown are no part of it, leave them out: "
        f"--ignore='{pattern}' (in Python: ignore=)"
    )


def complete(leaves: Leaves, like: str | None = None) -> list[str]:
    """The trunks (of the family of `like`) that the file has all leaves of, the largest first.

    Of those that differ in the size of images alone, first the one whose grid of positions it has.
    """
    family = re.match(r"[a-z]+", like).group() if like else ""  # type: ignore
    # A trunk larger than the file is not in it; position embeddings may be fewer.
    possible = [t for t in _not_above(leaves, 1.1) if t.startswith(family)]
    counts = {
        trunk: max(
            (
                (len(fit.wanted), _same_grid(fit, leaves, trunk))
                for fit in find_fits(leaves, trunk)
                if _whole(fit, leaves, trunk)
            ),
            default=(0, False),
        )
        for trunk in possible
    }
    found = [trunk for trunk in counts if counts[trunk][0]]
    return sorted(found, key=lambda trunk: counts[trunk], reverse=True)


def nearest(leaves: Leaves) -> tuple[str, float]:
    """The trunk of which the file has the largest share of leaves at their size, and that share.

    "" and 0 where the file has not half the numbers of any.
    """

    def share(fit: Fit, trunk: str) -> float:
        sizes = shapes(trunk, fit.form)
        there = (
            theirs in leaves and same_size(ours, leaves[theirs].size, sizes[ours])
            for ours, theirs in fit.wanted.items()
        )
        return sum(there) / len(fit.wanted)

    likely = _not_above(leaves, 2)
    found = {t: max(share(fit, t) for fit in find_fits(leaves, t)) for t in likely}
    return max(found.items(), key=lambda one: one[1], default=("", 0.0))


def _not_above(leaves: Leaves, times: float) -> list[str]:
    """The trunks that have at most so many times the file's numbers."""
    most = times * sum(leaf.size for leaf in leaves.values())
    return [trunk for trunk in table.TRUNKS if PARAMETERS.get(trunk, 0) <= most]


def _same_grid(fit: Fit, leaves: Leaves, trunk: str) -> bool:
    """Whether position embeddings are as many as the trunk's; true where there are none."""
    ours, sizes = "params/stem/positions", shapes(trunk, fit.form)
    return ours not in sizes or leaves[fit.wanted[ours]].size == math.prod(sizes[ours])


def _stem(name: str, wanted: Collection[str]) -> str:
    """A pattern of the shortest start of a name, up to a dot or slash, that no wanted name has."""
    for end in (found.end() for found in re.finditer(r"[./]", name)):
        if not any(other.startswith(name[:end]) for other in wanted):
            return re.escape(name[:end])
    return re.escape(name) + "$"


def first(names: Sequence[str], count: int = 3) -> str:
    """The first of the names, each cut to a line's measure.

    >>> first(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(name[:80] for name in names[:count]) + more
