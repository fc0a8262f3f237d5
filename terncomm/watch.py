"""Records bytes and seconds of every step: as JSON lines, in TensorBoard, in the log."""

import atexit
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from terncomm.hooks.reducer import GradientReducer

_log = logging.getLogger("terncomm")

_PHASES = ("encode", "exchange", "decode")


class Watch:
    """Records the statistics of a state for every step, until :meth:`close` or the end of the program.

    Only rank 0 of the job records. Other ranks write a file too if its name contains "{rank}". The record of a step is
    written when the next step begins; the last one is written by :meth:`close`, or when the program ends. A `Watch` is
    also a context manager. If writing fails (the disk is full), it logs a warning and stops; training goes on.

    Args:
        state: what `terncomm.register` returned, a `GradientAverager`, or a `DistributedOptimizer`'s `averager`.
        jsonl: file to which one line is appended per step: step, seconds (from the start of this step to the start of
            the next), and the counters of `state.stats()` for this step: raw_bytes, wire_bytes, exact_bytes,
            coded_numel, exact_numel, encode_s, exchange_s, decode_s, and so on. clip_norm_lost/NAME is there only in
            steps that measured it. "{rank}" in the name is replaced by the rank.
        tensorboard: directory for TensorBoard, or a `SummaryWriter`; gets the same numbers, named terncomm/NAME.
        log_every: number of steps between lines in the log "terncomm", level INFO, which hold means; 0 for none.

    Raises:
        TypeError: `state` is something else.
        ValueError: `log_every` is negative.
        ModuleNotFoundError: `tensorboard` is a directory, and tensorboard is not installed.
        OSError: the file cannot be opened for writing.
    """

    def __init__(
        self,
        state: GradientReducer,
        *,
        jsonl: str | Path | None = None,
        tensorboard: Any = None,
        log_every: int = 100,
    ) -> None:
        if not isinstance(state, GradientReducer):
            raise TypeError(f"wanted what terncomm.register returned, or a GradientAverager, got {state!r}")
        if log_every < 0:
            raise ValueError(f"log_every must not be negative, got {log_every}")
        self._state = state
        self._log_every = log_every
        self._close: list[Callable[[], None]] = []
        self._write: list[Callable[[dict[str, Any]], object]] = []
        self._before: dict[str, int | float] = {}  # statistics when the step began
        self._kept: dict[str, int | float] = {}  # counts of this step from before a reset of the statistics
        self._step = -1
        self._began = time.perf_counter()
        self._since_log: list[dict[str, Any]] = []
        rank = state.rank
        if jsonl is not None and (rank == 0 or "{rank}" in str(jsonl)):
            self._to_file(Path(str(jsonl).replace("{rank}", str(rank))))
        if rank == 0:
            if tensorboard is not None:
                self._to_tensorboard(tensorboard)
            if log_every:
                self._write.append(self._to_log)
        if self._write:
            state.statistics.watches.append(self)
            atexit.register(self.close)  # also runs after Ctrl-C

    def _to_file(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", buffering=1, encoding="utf-8")
        self._write.append(lambda record: file.write(json.dumps(record) + "\n"))
        self._close.append(file.close)

    def _to_tensorboard(self, where: Any) -> None:
        writer = where
        if isinstance(where, (str, Path)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"tensorboard= needs TensorBoard ({error}): pip install tensorboard"
                ) from None
            writer = SummaryWriter(str(where))
            self._close.append(writer.close)

        def write(record: dict[str, Any]) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(f"terncomm/{name}", value, record["step"])

        self._write.append(write)

    def _to_log(self, record: dict[str, Any]) -> None:
        self._since_log.append(record)
        if len(self._since_log) < self._log_every:
            return
        steps, self._since_log = self._since_log, []
        mean = {name: sum(each[name] for each in steps) / len(steps) for name in steps[0] if "/" not in name}
        phases = ", ".join(f"{phase} {1e3 * mean[f'{phase}_s']:.1f} ms" for phase in _PHASES)
        _log.info(
            "step %d: %.2f MB of gradients as %.2f MB sent per rank and step, %.0f ms: %s",
            record["step"], mean["raw_bytes"] / 1e6, mean["wire_bytes"] / 1e6, 1e3 * mean["seconds"], phases,
        )  # fmt: skip

    def on_step(self) -> None:
        """Write the record of the last step; the state calls this before each step."""
        self._record()
        self._before, self._step, self._began = self._state.stats(), self._state.step + 1, time.perf_counter()
        self._kept = {}

    def on_reset(self) -> None:
        """Save the counts of this step; the state calls this before it resets its statistics to zero."""
        for name, value in self._state.stats().items():
            self._kept[name] = self._kept.get(name, 0) + value - self._before.get(name, 0)
        self._before = {}

    def _record(self) -> None:
        if self._step < 0:
            return
        now, state = time.perf_counter(), self._state
        numbers = state.stats()
        record: dict[str, Any] = {"step": self._step, "seconds": now - self._began}
        for name, value in numbers.items():
            if name.startswith("clip"):
                if state.clip_watch.measures_at(self._step):
                    record[name] = value
            elif name != "steps":
                record[name] = value - self._before.get(name, 0) + self._kept.get(name, 0)
        try:
            for write in self._write:
                write(record)
        except Exception as error:
            _log.warning(
                "Watch stops: cannot write the record of step %d: %s: %s", self._step, type(error).__name__, error
            )
            self._stop()

    def close(self) -> None:
        """Write the record of the last step and close the files. A second call does nothing."""
        if self not in self._state.statistics.watches:
            return
        try:
            self._record()
        finally:
            self._stop()

    def _stop(self) -> None:
        if self not in self._state.statistics.watches:
            return
        self._state.statistics.watches.remove(self)
        atexit.unregister(self.close)
        for close in self._close:
            with suppress(OSError):  # the failed write is in the log already
                close()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
