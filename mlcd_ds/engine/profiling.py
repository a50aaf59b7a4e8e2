"""A trace of some steps by torch.profiler, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile

from mlcd_ds.errors import UserError


class StepProfiler:
    """Traces steps first ... last (counted from 1) into RUN/profile/, with all that the process does between them.

    A run that ends before the last of them writes what it has; one that resumes after the first traces the rest.
    """

    def __init__(self, out: Path, steps: tuple[int, int] | None) -> None:
        self._out, self._steps = out, steps
        self._record: profile | None = None
        self._first = self._last = 0

    def before(self, step: int) -> None:
        """Call before step `step`, counted from 0."""
        if self._steps and self._record is None and self._steps[0] <= step + 1 <= self._steps[1]:
            self._first = step + 1
            self._record = profile()
            self._record.start()

    def after(self, step: int) -> None:
        """Call after step `step`."""
        self._last = step + 1
        if self._steps and self._last == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace, if one was begun."""
        if self._record is None:
            return
        record, self._record = self._record, None
        record.stop()
        path = self._out / "profile" / f"steps_{self._first}-{self._last}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            record.export_chrome_trace(str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}).") from None
