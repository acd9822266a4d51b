"""Files of known content: fetched once, checked against a sha256, never overwritten.

Where no sum is known beforehand, the first download's is recorded in a lock file and holds from
then on. Public: ``PinnedFile``, ``Shelf``.
"""

import contextlib
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.downloads import Fetcher, FetchError
from utils.errors import InputError
from utils.files import read_json, replacing, sha256_of_file, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_MEMBER = 2**30  # bytes of one file in an archive


@dataclass(frozen=True)
class PinnedFile:
    """What to fetch and where it goes."""

    path: str  # below the output folder
    url: str
    sha256: str | None = None  # None: pinned on first use
    megabytes: float = 0.0  # about; for the estimate
    min_bytes: int = 1  # fewer is an error page or a Git LFS pointer
    members: str | None = None  # a zip's files to unpack beside it (regex); the zip is then removed


class Shelf:
    """The output folder and its lock file (path -> url, sha256, bytes, and for an archive the
    number of files unpacked)."""

    def __init__(self, folder: Path, lock: Path) -> None:
        self.folder, self._lock = folder, lock
        self._entries = self._recorded()

    def _recorded(self) -> dict[str, Any]:
        """What the lock file holds now."""
        return read_json(self._lock) if self._lock.exists() else {}

    def pin(self, file: PinnedFile) -> str | None:
        """The sum the file must have: the published one, or the one recorded on first use."""
        return file.sha256 or self._entries.get(file.path, {}).get("sha256")

    def has(self, file: PinnedFile) -> bool:
        """Whether the file, or all that its archive holds, is there. InputError if a file is there
        that is not the pinned one, or cannot become it. Writes nothing."""
        path, pin = self.folder / file.path, self.pin(file)
        if path.exists():
            if pin is None and (size := path.stat().st_size) < file.min_bytes:
                raise InputError(
                    f"{path}: {size:,} bytes cannot be this file; move it away to fetch it anew"
                )
            if pin is not None and pin != (found := sha256_of_file(path)):
                raise InputError(
                    f"{path}: its sha256 is {found}, pinned is {pin}; move it away to fetch it anew"
                )
            return file.members is None
        unpacked = self._entries.get(file.path, {}).get("unpacked")
        return unpacked is not None and all((path.parent / name).is_file() for name in unpacked)

    def adopt(self, file: PinnedFile) -> str | None:
        """Pins a file that was there before any sum was recorded, and says so; None if it needs no
        pin."""
        path = self.folder / file.path
        if self.pin(file) is not None:
            return None
        found = sha256_of_file(path)
        self._record(file, found, path.stat().st_size)
        return f"was there; no sum is published: pinned on first use, sha256 {found}"

    def get(self, file: PinnedFile, fetcher: Fetcher, progress: Callable[..., None]) -> str:
        """Fetches what ``has`` says is missing and returns what was done, in words. FetchError if
        it cannot be had or is not what is pinned; then nothing is kept that could be mistaken
        for it. InputError if another run is fetching it."""
        path = self.folder / file.path
        done = "unpacked"
        with _alone(path):
            if not path.exists():
                done = self._fetch(file, path, fetcher, progress)
            if file.members is not None:
                count = self._unpack(file, path)
                done += f", {count:,} files unpacked"
        return done

    def _fetch(
        self, file: PinnedFile, path: Path, fetcher: Fetcher, progress: Callable[..., None]
    ) -> str:
        """The file alone; returns what was done, in words."""
        partial = path.with_name(f".{path.name}.partial")
        fetcher.save(file.url, partial, progress=progress)
        found, size, pin = sha256_of_file(partial), partial.stat().st_size, self.pin(file)
        if pin not in (None, found):
            partial.unlink()
            raise FetchError("wrong_sum", f"sha256 is {found}, pinned is {pin}; not kept")
        if size < file.min_bytes:
            partial.unlink()
            raise FetchError("wrong_size", f"{size:,} bytes cannot be this file; not kept")
        done = "fetched, sha256 as pinned"
        if pin is None:
            self._record(file, found, size)
            done = f"fetched, no sum is published: pinned on first use, sha256 {found}"
        os.replace(partial, path)
        return done

    def _unpack(self, file: PinnedFile, path: Path) -> int:
        """Unpacks the members wanted, each under a temporary name first, and removes the zip."""
        assert file.members is not None
        digest, size = sha256_of_file(path), path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            wanted = [i for i in archive.infolist() if re.fullmatch(file.members, i.filename)]
            for member in wanted:
                target = path.parent / member.filename
                if target.exists() and target.stat().st_size == member.file_size:
                    continue
                if member.file_size > MAX_MEMBER:
                    raise FetchError("too_large", f"{member.filename}: {member.file_size:,} bytes")
                with replacing(target) as temporary:
                    temporary.write_bytes(archive.read(member))
        if not wanted:
            raise FetchError("wrong_content", f"no member of {path} matches {file.members}")
        self._record(file, digest, size, unpacked=[member.filename for member in wanted])
        path.unlink()
        return len(wanted)

    def _record(self, file: PinnedFile, sha256: str, size: int, **more: Any) -> None:
        self._entries = self._recorded()  # another run may have recorded other files meanwhile
        self._entries[file.path] = {"url": file.url, "sha256": sha256, "bytes": size, **more}
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._lock, dict(sorted(self._entries.items())))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other runs from fetching ``path`` during the block; InputError if one is at it. Where
    the system or the file system has no such locks, nothing tells two runs of each other."""
    if fcntl is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another run is fetching it; wait for its end") from None
        except OSError:
            pass  # the file system has no locks
        if not lock.exists() or lock.stat().st_ino != os.fstat(file.fileno()).st_ino:
            # a run that has just ended took this lock away before it was ours
            raise InputError(f"{path}: another run is fetching it; wait for its end")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
