"""Work that goes on behind the caller's own: decoding and writing pictures while the next ones are
sampled.

Public: ``Behind``.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Result = TypeVar("Result")
WAITING = 1  # jobs: more would hold their data in memory and save no time


class Behind(Generic[Result]):
    """Runs jobs in one thread, one after the other in the order in which they come.

    Called with a job, it returns at once unless ``WAITING`` jobs wait already. ``done`` hears each
    result in the caller's thread; what a job raised is raised there too, at the next call or at the
    end. Use as a context: its end waits for all jobs, or drops those that have not begun where the
    block raised.

    ``at_once`` runs each job in the caller's thread instead: on a CPU both would use all processors
    and wait for each other.
    """

    def __init__(self, done: Callable[[Result], object], *, at_once: bool) -> None:
        self._done = done
        self._at_once = at_once
        self._jobs: deque[Future[Result]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __call__(self, job: Callable[[], Result]) -> None:
        if self._at_once:
            self._done(job())
            return
        self._collect(WAITING)
        self._jobs.append(self._thread.submit(job))

    def _collect(self, left: int) -> None:
        """Takes the results that are there, and waits until at most ``left`` jobs have none."""
        while self._jobs and (len(self._jobs) > left or self._jobs[0].done()):
            self._done(self._jobs.popleft().result())

    def __enter__(self) -> "Behind[Result]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._collect(0)
        finally:
            self._thread.shutdown(cancel_futures=True)
