"""The training images of memorized prompts: every place asked in turn, every try written down.

Public: ``Settings``, ``AttemptLog``, ``Collector``, ``image_path``, ``LOCAL``, ``OWN``, ``REPORT``.
"""

import hashlib
import itertools
import sqlite3
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.downloads import Fetcher, FetchError
from utils.errors import InputError
from utils.files import Prompt, write_bytes, write_table
from utils.image_checks import Picture, PictureError, inspect, near, placeholders
from utils.web_archives import Capture, Place

REPORT = "training_images.csv"
LOCAL = "local"  # the stage that is asked anew in every run: its owner adds to the folder
OWN = "own"  # source of a file that was in the folder and is not in the log
KNOWN_FROM_OTHERS = "known from other rows"  # why a picture is a placeholder

Known = Sequence[tuple[str, bytes]]  # (sha256, thumbnail) of the placeholders known so far

# Shows a stage's progress: (what is being done, its name, how many).
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


def _silent(asked: Iterable[Any], stage: str, total: int) -> Iterable[Any]:
    return asked


SCHEMA = """
CREATE TABLE IF NOT EXISTS about (prompts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY, time TEXT NOT NULL, row INTEGER NOT NULL, stage TEXT NOT NULL,
    url TEXT NOT NULL, status TEXT NOT NULL, detail TEXT NOT NULL, bytes INTEGER NOT NULL,
    sha256 TEXT);
CREATE TABLE IF NOT EXISTS images (
    row INTEGER PRIMARY KEY, source TEXT NOT NULL, url TEXT NOT NULL, sha256 TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, thumbnail BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS finished (
    row INTEGER NOT NULL, stage TEXT NOT NULL, PRIMARY KEY (row, stage));
CREATE TABLE IF NOT EXISTS placeholders (sha256 TEXT PRIMARY KEY, thumbnail BLOB NOT NULL);
"""


def image_path(folder: Path, row: int) -> Path:
    """The file of a prompt's training image. It holds the bytes as they were found, whatever the
    format: readers go by content."""
    return folder / f"{row:04d}_first_image.jpg"


@dataclass(frozen=True)
class Kept:
    """A picture that counts."""

    source: str
    url: str
    sha256: str
    picture: Picture


class AttemptLog:
    """The SQLite file: every try, the pictures that count, stages that need not be asked again,
    and known placeholders. Safe to use from several threads; each call is one transaction."""

    def __init__(self, path: Path, prompts_sum: str) -> None:
        """InputError if the file is no such log, belongs to another prompt file, or is in use."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(path, timeout=1, check_same_thread=False)
            self._base.execute("PRAGMA locking_mode = EXCLUSIVE")
            # Locked at once: where the tables are there, the schema alone would only read.
            self._base.executescript(f"BEGIN EXCLUSIVE; {SCHEMA} COMMIT;")
            stored = self._rows("SELECT prompts FROM about")
        except sqlite3.Error as error:
            raise InputError(
                f"{path}: {error}; wait if another run is using it, or else move it away"
            ) from None
        if not stored:
            self._do("INSERT INTO about VALUES (?)", prompts_sum)
        elif stored[0][0] != prompts_sum:
            raise InputError(
                f"{path}: belongs to a prompt file with sha256 {stored[0][0]}, this one's is "
                f"{prompts_sum}; use another --images"
            )

    def _do(self, statement: str, *values: object) -> None:
        with self._lock, self._base:
            self._base.execute(statement, values)

    def _rows(self, statement: str, *values: object) -> list[tuple]:
        with self._lock:
            return self._base.execute(statement, values).fetchall()

    def add(
        self,
        row: int,
        stage: str,
        url: str,
        status: str,
        detail: str = "",
        size: int = 0,
        sha256: str | None = None,
    ) -> None:
        """Writes down one try."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._do(
            "INSERT INTO attempts (time, row, stage, url, status, detail, bytes, sha256) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(now, row, stage, url, status, detail[:500], size, sha256),
        )

    def keep(self, row: int, kept: Kept) -> None:
        """Notes that a picture counts."""
        picture = kept.picture
        self._do(
            "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(row, kept.source, kept.url, kept.sha256),
            *(picture.width, picture.height, picture.thumbnail),
        )

    def drop(self, row: int) -> None:
        """A picture no longer counts."""
        self._do("DELETE FROM images WHERE row = ?", row)

    def images(self) -> dict[int, Kept]:
        """The pictures that count, by row."""
        return {
            row: Kept(source, url, sha256, Picture(width, height, thumbnail))
            for row, source, url, sha256, width, height, thumbnail in self._rows(
                "SELECT * FROM images ORDER BY row"
            )
        }

    def finish(self, row: int, stage: str) -> None:
        """A stage has given its final answer for this row."""
        self._do("INSERT OR IGNORE INTO finished VALUES (?, ?)", row, stage)

    def finished(self) -> set[tuple[int, str]]:
        """All (row, stage) that need not be asked again."""
        return set(self._rows("SELECT row, stage FROM finished"))

    def forget_finished(self) -> None:
        """Lets every stage be asked again."""
        self._do("DELETE FROM finished")

    def add_placeholder(self, kept: Kept) -> None:
        """Remembers a picture that is never a training image."""
        self._do(
            "INSERT OR IGNORE INTO placeholders VALUES (?, ?)", kept.sha256, kept.picture.thumbnail
        )

    def placeholders(self) -> Known:
        """The known placeholders."""
        return self._rows("SELECT sha256, thumbnail FROM placeholders")

    def attempts(self) -> list[tuple[int, str, str, str, int, str | None]]:
        """(row, stage, status, detail, bytes, sha256) of every try, in order."""
        return self._rows("SELECT row, stage, status, detail, bytes, sha256 FROM attempts")

    def close(self) -> None:
        """Waits for a statement that another thread is executing."""
        with self._lock:
            self._base.close()


@dataclass(frozen=True)
class Settings:
    """How many captures of one archive are tried, how large a picture may be, how many rows are
    worked on at a time."""

    captures: int = 3
    max_pixels: int = 50_000_000
    workers: int = 8


class _LoggedWeb:
    """The web as one row at one stage asks it; whatever is not raised is written down here."""

    def __init__(self, log: AttemptLog, fetcher: Fetcher, row: int, stage: str) -> None:
        self._log, self._fetcher, self._row, self._stage = log, fetcher, row, stage
        self.misses: list[FetchError] = []

    def missed(self, error: FetchError) -> None:
        self.failed(error)
        self.misses.append(error)

    def failed(self, error: FetchError, url: str = "") -> None:
        """Writes a failure down."""
        where = error.url or url
        self._log.add(
            self._row, self._stage, where, error.status, error.detail, size=error.received
        )

    def index(self, url: str) -> str:
        try:
            body = self.body(url)
        except FetchError as error:
            if error.status != "http_404":
                raise
            self.failed(error)
            return ""
        self._log.add(self._row, self._stage, url, "index", size=len(body))
        return body.decode("utf-8", "replace")

    def body(self, url: str, **headers: str) -> bytes:
        return self._fetcher.fetch(url, headers, retried=self.failed).body


class Collector:
    """Fills ``folder`` with the training images of ``prompts``, stage by stage."""

    def __init__(
        self,
        folder: Path,
        log: AttemptLog,
        prompts: Iterable[Prompt],
        fetcher: Fetcher,
        settings: Settings,
    ) -> None:
        self._folder, self._log, self._fetcher = folder, log, fetcher
        self._prompts = {prompt.row: prompt for prompt in prompts}
        self._settings = settings

    def missing(self) -> list[Prompt]:
        """Prompts without a picture that counts. A file that is there but not in the log is the
        user's own: it is checked, counted and left as it is (InputError if it is no picture)."""
        kept = self._log.images()
        missing = []
        for row, prompt in self._prompts.items():
            path = image_path(self._folder, row)
            if not path.exists():
                if row in kept:
                    self._log.drop(row)
                missing.append(prompt)
                continue
            data = path.read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            if row in kept and kept[row].sha256 == sha256:
                continue
            try:
                picture = inspect(data, max_pixels=self._settings.max_pixels)
            except PictureError as error:
                raise InputError(f"{path}: {error}; move it away to look for another") from None
            self._log.keep(row, Kept(OWN, str(path), sha256, picture))
            self._log.add(row, OWN, str(path), "ok", size=len(data), sha256=sha256)
        return missing

    def collect(self, stages: Mapping[str, Place], progress: Progress = _silent) -> int:
        """Asks each place for all that is still missing. After each, pictures that turn out to be
        placeholders are dropped, and their rows go on to the next place; where an earlier place's
        picture is dropped, the places are asked once more for what that leaves missing. Returns
        how many rows stay missing of those that had a final answer before and were not asked for
        again there, though the settings may be others now."""
        before = {row for row, stage in self._log.finished() if stage in stages}
        again = True
        while again:
            again = False
            for stage, place in stages.items():
                self._run(stage, place, progress)
                again |= self._drop_placeholders() - {stage} != set()
        return len(before & (self._prompts.keys() - self._log.images().keys()))

    def _run(self, stage: str, place: Place, progress: Progress) -> None:
        finished, known = self._log.finished(), self._log.placeholders()
        todo = [prompt for prompt in self.missing() if (prompt.row, stage) not in finished]
        pool = ThreadPoolExecutor(self._settings.workers)
        try:
            asked = pool.map(lambda prompt: self._ask(stage, place, prompt, known), _spread(todo))
            for _ in progress(asked, stage, len(todo)):
                pass
        finally:  # does not wait for what is under way when the run is interrupted
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, stage: str, place: Place, prompt: Prompt, known: Known) -> None:
        """One row at one place: the first capture that is a picture counts."""
        web = _LoggedWeb(self._log, self._fetcher, prompt.row, stage)
        found = place(prompt, web) if prompt.url or stage == LOCAL else iter(())
        passing, captures = False, 0
        try:
            for capture in itertools.islice(found, self._settings.captures):
                captures += 1
                try:
                    if self._counts(stage, prompt.row, capture, known):
                        return
                except FetchError as error:
                    passing |= error.passing
                    web.failed(error, capture.url)
        except FetchError as error:  # the index
            passing |= error.passing
            web.failed(error, prompt.url)
        else:
            if captures == 0 and not web.misses:
                self._log.add(prompt.row, stage, prompt.url, "no_capture")
        passing |= any(error.passing for error in web.misses)
        if not passing and stage != LOCAL:
            self._log.finish(prompt.row, stage)

    def _counts(self, stage: str, row: int, capture: Capture, known: Known) -> bool:
        """Fetches one capture and keeps it if it is a picture. FetchError if it cannot be had."""
        data = capture.load()
        size, sha256 = len(data), hashlib.sha256(data).hexdigest()
        try:
            picture = inspect(data, max_pixels=self._settings.max_pixels)
            if _is_known(sha256, picture, known):
                raise PictureError("placeholder", KNOWN_FROM_OTHERS)
        except PictureError as error:
            self._log.add(row, stage, capture.url, error.status, error.detail, size, sha256)
            return False
        # Noted first, written second: a killed run leaves no file that nobody accounts for.
        self._log.keep(row, Kept(stage, capture.url, sha256, picture))
        write_bytes(image_path(self._folder, row), data)
        self._log.add(row, stage, capture.url, "ok", "", size, sha256)
        return True

    def _drop_placeholders(self) -> set[str]:
        """Drops pictures that several prompts share but cannot all own, and those that are known
        to be such, whether they came first or a killed run left them; returns their sources."""
        kept = {
            row: image
            for row, image in self._log.images().items()
            if image.source != OWN and row in self._prompts
        }
        known = self._log.placeholders()
        reasons = {
            row: KNOWN_FROM_OTHERS
            for row, image in kept.items()
            if _is_known(image.sha256, image.picture, known)
        }
        groups = placeholders(
            {row: self._prompts[row].caption for row in kept},
            {row: image.sha256 for row, image in kept.items()},
            {row: image.picture.thumbnail for row, image in kept.items()},
        )
        for group in groups:
            shared = f"shared by rows {', '.join(map(str, sorted(group)))}"
            for row in group:
                reasons[row] = shared
                self._log.add_placeholder(kept[row])
        for row, reason in sorted(reasons.items()):
            image = kept[row]
            image_path(self._folder, row).unlink(missing_ok=True)
            self._log.drop(row)
            if image.source != LOCAL:
                self._log.finish(row, image.source)
            self._log.add(row, image.source, image.url, "placeholder", reason, sha256=image.sha256)
        return {kept[row].source for row in reasons}

    def report(self) -> str:
        """Writes the table of all rows beside the pictures and returns, in words, how many came
        from where, and which are missing."""
        kept = self._log.images()
        reasons: dict[int, dict[str, str]] = defaultdict(dict)
        for row, stage, status, *_ in self._log.attempts():
            reasons[row][stage] = status
        table: list[tuple[object, ...]] = []
        for row in self._prompts:
            if row in kept:
                image, size = kept[row], kept[row].picture
                path = image_path(self._folder, row)
                found = (path.name, image.source, image.url, size.width, size.height, image.sha256)
                table.append((row, *found, ""))
            else:
                why = ", ".join(f"{stage}: {status}" for stage, status in reasons[row].items())
                table.append((row, "", "", "", "", "", "", why or "not asked"))
        columns = ("Row", "File", "Source", "Source URL", "Width", "Height", "sha256", "Missing")
        write_table(self._folder / REPORT, columns, table)
        here = [row for row in self._prompts if row in kept]
        sources = Counter(kept[row].source for row in here)
        missing = [row for row in self._prompts if row not in kept]
        lines = [f"{self._folder}: {len(here)} of {len(self._prompts)} training images"]
        lines += [f"  {count:>5} from {source}" for source, count in sources.most_common()]
        if missing:
            lines.append(f"  {len(missing):>5} missing: rows {_ranges(missing)}")
            causes = Counter(
                f"{stage} {status}" for row in missing for stage, status in reasons[row].items()
            )
            lines += [f"        {count:>5} {cause}" for cause, count in causes.most_common()]
        return "\n".join(lines)


def _is_known(sha256: str, picture: Picture, known: Known) -> bool:
    """Whether a picture is a known placeholder, byte for byte or nearly."""
    return any(sha256 == other or near(picture.thumbnail, thumbnail) for other, thumbnail in known)


def _spread(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Hosts by turns, so that the workers do not all wait for one of them."""
    seen: Counter[str] = Counter()
    turns = []
    for prompt in prompts:
        host = prompt.url.partition("://")[2].partition("/")[0]
        turns.append((seen[host], prompt))
        seen[host] += 1
    return [prompt for _, prompt in sorted(turns, key=lambda turn: (turn[0], turn[1].row))]


def _ranges(rows: Sequence[int]) -> str:
    """``[0, 1, 2, 7]`` -> ``0-2, 7``."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and row == parts[-1][-1] + 1:
            parts[-1].append(row)
        else:
            parts.append([row])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
