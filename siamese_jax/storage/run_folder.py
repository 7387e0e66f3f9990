"""A run's folder: what is written there, and what is checked when a run comes back to it.

config.json     the config, whole
run.json        versions, device, trunk and weights really used, data fingerprint, warnings
metrics.jsonl   a line per logged step
events/         the same for TensorBoard
checkpoints/    see checkpoint.py
report/         index.html, and per_query_<split>.npz behind its numbers
results.json    written last: a run that has it is finished
"""

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from siamese_jax.errors import UserError

PACKAGES = ("siamese-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_json(path: Path, value: Any) -> None:
    """Writes to a temporary file and renames it: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2, default=_plain) + "\n")
    os.replace(draft, path)


def read_json(path: Path) -> Any:
    """The content of a file; UserError where it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); choose another --workdir") from None


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def check(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes sure that a folder with checkpoints or results in it is of this config.

    Raises:
      UserError: it holds a run of another config; the message names the fields.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; choose another --workdir")
    begun = (workdir / "results.json").exists() or (workdir / "checkpoints").exists()
    if not begun or not (workdir / "config.json").exists():
        return
    before, now = _flat(read_json(workdir / "config.json")), _flat(_as_stored(config))
    changed = [
        f"{name} ({before.get(name)!r} there, {now.get(name)!r} now)"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config: {'; '.join(changed[:5])}"
            f"{' and more' if len(changed) > 5 else ''}. Choose another --workdir"
        )


def _as_stored(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config, default=_plain))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def environment() -> dict[str, Any]:
    """Versions and device, for run.json."""
    device = jax.devices()[0]
    return {
        "versions": {name: metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
    }


def check_comparable(a: Path, run_a: Mapping[str, Any], b: Path, run_b: Mapping[str, Any]) -> None:
    """UserError unless both runs were evaluated on the same images, split the same way.

    The data fingerprint covers each image's bytes, name, class, split and role.
    """
    if run_a["data"]["fingerprint"] == run_b["data"]["fingerprint"]:
        return
    splits = [
        ", ".join(f"{name} {part['images']} images" for name, part in run["split"].items())
        for run in (run_a, run_b)
    ]
    raise UserError(
        f"{a} and {b} cannot be compared: they were evaluated on different data or splits "
        f"({run_a['data']['source']}: {splits[0]}; {run_b['data']['source']}: {splits[1]}; "
        "fingerprints differ). Train both with the same data and data.split_seed"
    )
