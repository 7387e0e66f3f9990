"""metrics.jsonl and TensorBoard events: written as a run goes, read for its curves."""

import json
import shutil
import socket
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from siamese_jax.errors import UserError
from siamese_jax.processes import by_first
from siamese_jax.report.page import is_number
from siamese_jax.storage.json_files import json_text, numbers
from siamese_jax.storage.writing import written


@by_first
def read_curves(metrics_jsonl_path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run: `{"loss": [(step, value), ...], "test/recall@1": [...], ...}`.

    Every line is one JSON object with a "step"; the other numbers of the line are that step's
    points, null is NaN. A step logged twice (a run resumed after a crash) counts once, the later
    line wins. A last line cut short by a crash is skipped; a broken line before it is the user's to
    look at.

    Raises:
      UserError: there is no such file, or a line other than the last is no such object.
    """
    curves: dict[str, dict[int, float]] = {}
    try:
        lines = Path(metrics_jsonl_path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metrics_jsonl_path} cannot be read ({error})") from None
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
        for name, value in numbers(entry).items():
            if is_number(value):
                curves.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run that begins, or goes on, at a step.

    What the log holds of later steps is of a run that was cut off: it is dropped, by writing the
    rest beside and renaming it. The events are written anew from the log, so that no point is there
    twice; TensorBoard then shows them as of now.

    Args:
      workdir: the run's folder.
      step: where it goes on; -1 where there is no checkpoint, and nothing to keep.
      mark: of the log at that step, as the checkpoint has it; None for runs of version 0.1.0.

    Attributes:
      notes: what has to be said: a log that lost lines, or where they changed.
    """

    def __init__(self, workdir: Path, step: int, mark: Sequence[int] | None = None):
        path = workdir / "metrics.jsonl"
        data = path.read_bytes() if path.exists() else b""
        self.notes: list[str] = []
        kept = data[: mark[0]] if mark else b""
        if not mark or [len(kept), zlib.crc32(kept)] != [*mark]:
            lines = data.split(b"\n")
            kept = b"".join(line.rstrip() + b"\n" for line in lines if _step(line) <= step)
            if mark or (step > 0 and not kept):
                self.notes.append(
                    f"{path} was shortened, removed or changed: of the steps up to {step} it has "
                    f"{len(kept.splitlines())} lines that can be read, and the curves only those"
                )
        if kept != data:
            with written(path, "wb") as file:
                file.write(kept)
        self._mark = (len(kept), zlib.crc32(kept))
        self._file = open(path, "ab")  # noqa: SIM115  (closed by close)
        shutil.rmtree(workdir / "events", ignore_errors=True)
        self._events = Events(workdir / "events")
        for line in kept.splitlines():
            values = json.loads(line)
            self._events.write(int(values.pop("step")), values)
        self._events.flush()

    @property
    def mark(self) -> tuple[int, int]:
        """How many bytes the log has, and their CRC-32: kept with a checkpoint."""
        return self._mark

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a step's values to metrics.jsonl and to TensorBoard's events."""
        # Python writes the shortest decimal that reads back as the same float: nothing is lost.
        line = (json_text({"step": step, **values}) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self._mark = (self._mark[0] + len(line), zlib.crc32(line, self._mark[1]))
        self._events.write(step, values)
        self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        try:
            self._file.close()
        finally:  # also where the disk is full
            self._events.close()


class Events:
    """A new file of scalars in a folder, for TensorBoard; TensorFlow, seconds to load, writes none.

    Format: TFRecords of `Event` messages, the first of which names the version.
    """

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}"  # TensorBoard looks for it
        self._records = RecordWriter(open(folder / name, "ab"))  # noqa: SIM115  (closed by close)
        self._records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event of a step's numbers."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=n, simple_value=v) for n, v in values.items() if is_number(v)]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=points))
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Gives what was written to the system."""
        self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # A line that was cut off in the middle.
