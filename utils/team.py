"""The processes of one run: one, or several that ``accelerate launch`` or torchrun started.

Prompts cost between one and a thousand evaluations, so fixed slices would leave devices idle.
Units of work are handed out one by one instead, by an atomic counter in the store that the
launcher's processes meet in; nothing else crosses the network. The first process opens the output
and, when all have finished, puts the parts together.
Public: ``Team``, ``join``, ``processes_here``, ``tell``, ``told``.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from utils.errors import InputError
from utils.files import is_whole_number

# Waiting for a slow unit elsewhere is no error: whether the others live is the launcher's business.
PATIENCE = datetime.timedelta(days=30)
BAD_INPUT = "bad input"  # key of the first process's last word
HEARING = datetime.timedelta(seconds=20)  # how long a failed process waits for the first one's word


@dataclass
class Team:
    """This process among all of the run: ``rank`` of ``size``, ``local_rank`` on its machine.

    ``store`` is None for a process on its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarted: bool = False  # by the launcher, after a process had died
    store: Any = None
    _done: int = 0  # by a process on its own
    _sections: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that opens and closes the output, and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Where this process computes: with several, ``cuda`` is each one's own GPU."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def say(self, text: str) -> None:
        """Prints once, not once a process."""
        if self.first:
            print(text)

    def section(self) -> "Team":
        """The same processes for a further piece of work, with keys and units of its own. All
        processes have to ask for their sections in the same order."""
        self._sections += 1
        if self.store is None:
            return Team()
        from torch.distributed import PrefixStore

        store = PrefixStore(f"section {self._sections}", self.store)
        return replace(self, store=store, _done=0, _sections=0)

    def gather(self, key: str, mine: str) -> list[str]:
        """What each process says, in the order of ranks; waits for all. Each key once a run."""
        if self.store is None:
            return [mine]
        keys = [f"{key} {rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], mine)
        self.store.wait(keys, PATIENCE)
        return [self.store.get(name).decode() for name in keys]

    def once(self, key: str, act: Callable[[], object]) -> None:
        """The first process acts; the others wait until it has. Each key once a run."""

        def acted() -> str:
            act()
            return "done"

        self.agree(key, acted)

    def agree(self, key: str, decide: Callable[[], str]) -> str:
        """What the first process decides; the others wait for it. Each key once a run."""
        if self.store is None:
            return decide()
        if self.first:
            self.store.set(key, decide())
        else:
            self.store.wait([key], PATIENCE)
        return self.store.get(key).decode()

    def deal(self, units: int) -> Iterator[int]:
        """Yields unit numbers from 0 to ``units`` - 1, rising; each goes to one process."""
        if self.store is None:
            yield from range(units)
            return
        while (unit := self.store.add("dealt", 1) - 1) < units:
            yield unit

    def done(self) -> int:
        """Says that a unit is done; how many are, in all processes, since the run began."""
        if self.store is not None:
            return self.store.add("done", 1)
        self._done += 1
        return self._done

    def finish(self) -> None:
        """Says that this process has done its share; the first one waits for all."""
        if self.store is None:
            return
        self.store.set(f"finished {self.rank}", "")
        if self.first:
            self.store.wait([f"finished {rank}" for rank in range(self.size)], PATIENCE)


def join() -> Team:
    """The team of this process, from the launcher's environment. Torch is imported only where
    there is more than one process, or was another before. InputError for a launcher that would
    restart processes on several machines, and where the one before a restart ended in bad input:
    what was refused then must not be taken for a run that has begun."""
    size, attempt = _of_launcher("WORLD_SIZE", 1), _attempt()
    if _of_launcher("GROUP_WORLD_SIZE", 1) > 1 and _of_launcher("TORCHELASTIC_MAX_RESTARTS", 0):
        # Each machine's launcher counts its own restarts: the processes would not meet again.
        raise InputError(
            "--max_restarts works on one machine; on several leave it out, and when a process has "
            "died start all again with --continue_run"
        )
    if attempt:
        before = _store(attempt - 1)
        if before.check([BAD_INPUT]):
            raise InputError(before.get(BAD_INPUT).decode())
    if size == 1:
        return Team(restarted=attempt > 0)
    return Team(
        rank=_of_launcher("RANK", 0),
        size=size,
        local_rank=_of_launcher("LOCAL_RANK", 0),
        restarted=attempt > 0,
        store=_store(attempt),
    )


def _attempt() -> int:
    """How often the launcher has restarted this run."""
    return _of_launcher("TORCHELASTIC_RESTART_COUNT", 0)


def _of_launcher(name: str, usual: int) -> int:
    """A number from the launcher's environment. InputError for something else."""
    text = os.environ.get(name, str(usual))
    if not is_whole_number(text):
        raise InputError(
            f"{name}={text[:40]}: not a whole number; the launcher sets it, unset it without one"
        )
    return int(text)


def _store(attempt: int, **options: Any) -> Any:
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # The store alone: no process group, whose backends would want devices and open connections.
    try:
        store, _, _ = next(rendezvous("env://", **options))
    except ValueError as error:  # a variable that is missing
        raise InputError(
            f"{error}; the launcher sets it, unset WORLD_SIZE and TORCHELASTIC_RESTART_COUNT "
            "without one"
        ) from error
    # the launcher's store outlives a restart, and with it what was dealt before
    return PrefixStore(f"attempt {attempt}", store)


def processes_here() -> int:
    """How many processes of the run this machine has."""
    return _of_launcher("LOCAL_WORLD_SIZE", 1)


# A process may end before it has joined, and with a reason that no other has: that a file is
# missing on its machine. So those that end in bad input ask whether the first one said the same.


def tell(message: str) -> None:
    """The first process's last word, for the others and for those after a restart."""
    with contextlib.suppress(InputError, RuntimeError, ValueError):  # without them, or a store
        if _of_launcher("WORLD_SIZE", 1) > 1 or "TORCHELASTIC_RESTART_COUNT" in os.environ:
            _store(_attempt(), timeout=HEARING).set(BAD_INPUT, message)


def told(message: str) -> bool:
    """Whether the first process ended with the same message; False if it says nothing."""
    with contextlib.suppress(InputError, RuntimeError, ValueError):
        if _of_launcher("WORLD_SIZE", 1) > 1:
            store = _store(_attempt(), timeout=HEARING)
            store.wait([BAD_INPUT], HEARING)
            return store.get(BAD_INPUT).decode() == message
    return False
