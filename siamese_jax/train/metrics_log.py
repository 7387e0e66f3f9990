"""metrics.jsonl and TensorBoard events: written as a run goes, read for its curves."""

import json
from collections.abc import Mapping
from pathlib import Path

from siamese_jax.errors import UserError
from siamese_jax.report.page import is_number


def read_curves(metrics_jsonl_path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run: `{"loss": [(step, value), ...], "test/recall@1": [...], ...}`.

    Every line is one JSON object with a "step"; the other numbers of the line are that step's
    points. A step logged twice (a run resumed after a crash) counts once, the later line wins. A
    last line cut short by a crash is skipped; a broken line before it is the user's to look at.

    Raises:
      UserError: a line other than the last is no such object.
    """
    curves: dict[str, dict[int, float]] = {}
    lines = Path(metrics_jsonl_path).read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            if i == len(lines) - 1:
                break
            raise UserError(
                f"{metrics_jsonl_path}, line {i + 1}: expected a JSON object with a step; "
                "mend or remove that line"
            ) from None
        for name, value in entry.items():
            if is_number(value):
                curves.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


class MetricsLog:
    """metrics.jsonl and TensorBoard events; lines after `step` are of a run that was cut off."""

    def __init__(self, workdir: Path, step: int):
        import tensorflow as tf

        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            kept = [line for line in lines if _step(line) <= step]
            self._path.write_text("".join(line + "\n" for line in kept))
        self._file = open(self._path, "a")  # noqa: SIM115  (closed by close)
        self._events = tf.summary.create_file_writer(str(workdir / "events"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a step's values to metrics.jsonl and to TensorBoard's events."""
        import tensorflow as tf

        # Python writes the shortest decimal that reads back as the same float: nothing is lost.
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        with self._events.as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step=step)
        self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # A line that was cut off in the middle.
