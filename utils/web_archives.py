"""Where a picture whose link may be dead can still be found: one generator per place.

Each takes a prompt and a ``Web`` and yields captures, the likeliest first; it asks an archive's
index only when a capture is wanted. Public: ``Capture``, ``Web``, ``Place``, ``original``,
``wayback``, ``arquivo``, ``common_crawl``, ``local_folder``, ``warc_payload``.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode

from utils.downloads import FetchError, bounded_inflate
from utils.files import Prompt

T = TypeVar("T")
CENTRE = 2021_01_01  # LAION's links were collected from crawls up to 2021


class Web(Protocol):
    """What a place asks. FetchError where there is no answer."""

    def index(self, url: str) -> str:
        """An index's answer; "" also for 404, with which archives say "no captures"."""

    def body(self, url: str, **headers: str) -> bytes:
        """A picture's bytes, or those of the record that it is in."""

    def missed(self, error: FetchError) -> None:
        """An index that failed, of a place that asks others, too."""


@dataclass(frozen=True)
class Capture:
    """One copy of a picture: where it is, and how to get its bytes (FetchError if it cannot)."""

    url: str
    load: Callable[[], bytes]


Place = Callable[[Prompt, Web], Iterator[Capture]]


def original(prompt: Prompt, web: Web) -> Iterator[Capture]:
    """The link itself."""
    yield Capture(prompt.url, lambda: web.body(prompt.url))


def wayback(base: str) -> Place:
    """The Internet Archive's Wayback Machine: CDX index, then the raw capture (``id_``)."""

    def place(prompt: Prompt, web: Web) -> Iterator[Capture]:
        query = [
            ("url", prompt.url),
            ("output", "json"),
            ("fl", "timestamp,original"),
            ("filter", "statuscode:200"),
            ("filter", "!mimetype:text/.*"),
            ("collapse", "digest"),
            ("limit", "50"),
        ]
        body = web.index(f"{base}/cdx/search/cdx?{urlencode(query)}")
        rows = _parsed(body or "[]", lambda table: [(str(time), str(url)) for time, url in table])
        yield from _replays(rows[1:], f"{base}/web/{{}}id_/{{}}", web)

    return place


def arquivo(base: str) -> Place:
    """arquivo.pt: CDX index (one JSON object a line), then the capture without its frame."""

    def place(prompt: Prompt, web: Web) -> Iterator[Capture]:
        query = [("url", prompt.url), ("output", "json"), ("filter", "=status:200")]
        body = web.index(f"{base}/wayback/cdx?{urlencode(query)}")
        rows = [
            _parsed(line, lambda row: (str(row["timestamp"]), str(row["url"])))
            for line in body.splitlines()
        ]
        yield from _replays(rows, f"{base}/noFrame/replay/{{}}id_/{{}}", web)

    return place


def common_crawl(index: str, data: str, crawls: Sequence[str], max_bytes: int) -> Place:
    """Common Crawl: the index of each crawl in turn, then one record of a WARC file. Where one
    index fails, the others are asked all the same."""

    def captures(crawl: str, prompt: Prompt, web: Web) -> Iterator[Capture]:
        query = [("url", prompt.url), ("output", "json"), ("filter", "=status:200")]
        body = web.index(f"{index}/{crawl}-index?{urlencode(query)}")
        for line in body.splitlines():
            name, start, length = _parsed(
                line, lambda row: (str(row["filename"]), int(row["offset"]), int(row["length"]))
            )
            url, span = f"{data}/{name}", f"bytes={start}-{start + length - 1}"

            def load(url: str = url, span: str = span) -> bytes:
                return warc_payload(web.body(url, Range=span), max_bytes)

            yield Capture(f"{url}#{span}", load)

    def place(prompt: Prompt, web: Web) -> Iterator[Capture]:
        for crawl in crawls:
            try:
                yield from captures(crawl, prompt, web)
            except FetchError as error:
                web.missed(error)

    return place


def local_folder(folder: Path, max_bytes: int) -> Place:
    """A folder of the user's own, with names that begin with the row: ``0001_anything.png``."""

    def place(prompt: Prompt, web: Web) -> Iterator[Capture]:
        for path in sorted(filter(Path.is_file, folder.glob(f"{prompt.row:04d}[._]*"))):

            def load(path: Path = path) -> bytes:
                if path.stat().st_size > max_bytes:
                    raise FetchError("too_large", f"{path}: {path.stat().st_size:,} bytes")
                return path.read_bytes()

            yield Capture(str(path), load)

    return place


def warc_payload(record: bytes, max_bytes: int) -> bytes:
    """The body of the HTTP response in one gzipped WARC record. FetchError if there is none."""
    head, _, rest = bounded_inflate([record], max_bytes).partition(b"\r\n\r\n")
    http, found, body = rest.partition(b"\r\n\r\n")
    if not found or not http.startswith(b"HTTP/") or http.split()[1:2] != [b"200"]:
        raise FetchError("bad_index", "the WARC record holds no HTTP response with status 200")
    fields = dict(line.lower().partition(b":")[::2] for line in head.splitlines())
    if b"warc-truncated" in fields:
        raise FetchError("broken", "Common Crawl kept only the beginning")
    return body.removesuffix(b"\r\n\r\n")


def _parsed(text: str, pick: Callable[[Any], T]) -> T:
    """``pick`` of a JSON text, or FetchError bad_index: what an archive sends is not trusted."""
    try:
        picked = pick(json.loads(text))
        # ValueError for a lone surrogate, which can be neither asked for nor written down.
        json.dumps(picked, ensure_ascii=False).encode()
        return picked
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FetchError("bad_index", f"{text[:80]!r}: {error}") from None


def _replays(rows: Sequence[tuple[str, str]], form: str, web: Web) -> Iterator[Capture]:
    """Captures nearest in time to when LAION's links were collected, first."""
    dated = [(time, url) for time, url in rows if time.isascii() and time.isdigit()]
    for time, url in sorted(dated, key=lambda row: abs(int(row[0][:8]) - CENTRE)):
        address = form.format(time, url)
        yield Capture(address, partial(web.body, address))
