"""prompts/download.py against servers on loopback, most of them hostile; nothing leaves it."""

import gzip
import ipaddress
import json
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import hostile_servers as hostile
import pytest
from hostile_servers import Talk, picture, response, serving

from utils import web_archives
from utils.downloads import Fetcher, FetchError, Limits, is_public
from utils.errors import InputError
from utils.files import Prompt, read_table, write_table
from utils.image_checks import PictureError, inspect, near, placeholders
from utils.pinned_files import PinnedFile, Shelf
from utils.training_images import AttemptLog, Collector, Settings, image_path

ROOT = Path(__file__).resolve().parent.parent
REAL_FILES = ROOT.parent / "shared" / "laion"
LOOPBACK = [ipaddress.ip_network("127.0.0.1/32")]
MEGABYTE = 2**20
LIMITS = Limits(
    seconds=2.5,
    silence=1,
    max_bytes=MEGABYTE,
    redirects=3,
    tries=2,
    back_off=0.01,
    longest_wait=2,
    pause=0,
)


def make_fetcher(limits: Limits = LIMITS, **options: Any) -> Fetcher:
    return Fetcher(limits, allowed=LOOPBACK, **options)


class Folder:
    """A folder of training images with its log, and what a run leaves there."""

    def __init__(self, path: Path, prompts: list[Prompt], fetcher: Fetcher | None = None) -> None:
        self.path = path
        self.log = AttemptLog(path / "attempts.sqlite", "prompts")
        self.collector = Collector(
            path, self.log, prompts, fetcher or make_fetcher(), Settings(workers=4)
        )

    def files(self) -> dict[str, bytes]:
        """All files but the log, hidden ones included."""
        return {
            path.name: path.read_bytes()
            for path in self.path.iterdir()
            if not path.name.startswith("attempts.sqlite")
        }

    def statuses(self, row: int = 0) -> list[str]:
        return [status for r, _, status, *_ in self.log.attempts() if r == row]


# Servers: what is recorded, and whether the picture counts.

FAST = LIMITS
PATIENT = replace(LIMITS, silence=1.5, seconds=2.5, tries=1)
ONCE = replace(LIMITS, tries=1)

NO_PORT = hostile.redirects_to("http://127.0.0.1:99999999999999999999/")
METADATA = hostile.redirects_to("http://169.254.169.254/")
ONE_SECOND = hostile.status("429 Slow down", times=1, Retry_After=1)
DATE = hostile.status("503 Busy", times=1, Retry_After="Fri, 31 Dec 2100 23:59:59 GMT")
ONE_HOUR = hostile.status("429 Slow down", times=1, Retry_After=3600)

SERVERS = [
    ("honest", hostile.honest, FAST, ["ok"]),
    ("honest, compressed though not asked for", hostile.zipped, FAST, ["ok"]),
    ("hangs", hostile.hangs, FAST, ["timeout", "timeout"]),
    ("drips a byte a second", hostile.drips_body, PATIENT, ["timeout"]),
    ("drips its headers", hostile.drips_headers, ONCE, ["timeout"]),
    ("closes early, before a word", hostile.hangs_up, FAST, ["broken", "broken"]),
    ("lies about length: sends less", hostile.announces_more, FAST, ["broken", "broken"]),
    ("lies about length: sends more", hostile.announces_less, FAST, ["undecodable"]),
    ("announces ten terabytes", hostile.announces_terabytes, FAST, ["too_large"]),
    ("sends without end", hostile.endless_body, FAST, ["too_large"]),
    ("sends headers without end", hostile.endless_headers, FAST, ["broken", "broken"]),
    ("closes early, half-way, no length given", hostile.cut_off, FAST, ["undecodable"]),
    ("speaks another protocol", hostile.speaks_nonsense, FAST, ["broken", "broken"]),
    ("redirects without end", hostile.redirects_forever, FAST, ["redirects"]),
    ("redirects to a port that is none", NO_PORT, FAST, ["bad_url"]),
    ("redirects to a file", hostile.redirects_to("file:///etc/passwd"), FAST, ["bad_url"]),
    ("redirects to a metadata service", METADATA, FAST, ["blocked_address"]),
    ("HTML under an image's name", hostile.html, FAST, ["not_an_image"]),
    ("SVG under an image's name", hostile.svg, FAST, ["not_an_image"]),
    ("gzip bomb", hostile.zip_bomb, FAST, ["too_large"]),
    ("a coding not asked for", hostile.unknown_coding, FAST, ["bad_encoding"]),
    ("30,000 x 30,000 PNG", hostile.huge_png, FAST, ["too_many_pixels"]),
    ("one pixel", hostile.one_pixel, FAST, ["tiny"]),
    ("one colour", hostile.one_colour, FAST, ["uniform"]),
    ("404", hostile.status("404 Not Found", times=9), FAST, ["http_404"]),
    ("500 then good", hostile.status("500 Oops", times=1), FAST, ["http_500", "ok"]),
    ("500 for ever", hostile.status("500 Oops", times=9), FAST, ["http_500", "http_500"]),
    ("429 with Retry-After, then good", ONE_SECOND, FAST, ["http_429", "ok"]),
    ("429 with an hour of Retry-After", ONE_HOUR, FAST, ["http_429"]),
    ("503 with a date as Retry-After", DATE, FAST, ["http_503"]),
]


@pytest.mark.parametrize(
    ("behaviour", "limits", "expected"),
    [case[1:] for case in SERVERS],
    ids=[case[0] for case in SERVERS],
)
def test_what_a_server_does_is_recorded_and_nothing_bad_is_kept(
    tmp_path: Path, behaviour: hostile.Behaviour, limits: Limits, expected: list[str]
) -> None:
    with serving(behaviour) as server:
        folder = Folder(tmp_path, [Prompt(0, "A cat", f"{server.url}/a.jpg")], make_fetcher(limits))
        started = time.monotonic()
        folder.collector.collect({"url": web_archives.original})
        seconds = time.monotonic() - started
    assert folder.statuses() == expected
    if expected[-1] == "ok":
        assert folder.files() == {"0000_first_image.jpg": hostile.GOOD}
        assert folder.log.attempts()[-1][4:] == (
            len(hostile.GOOD),
            sha256(hostile.GOOD).hexdigest(),
        )
    else:
        assert folder.files() == {}
        assert folder.log.images() == {}
    if expected == ["http_429", "ok"]:
        assert seconds >= 1  # Retry-After was respected


def test_a_self_signed_certificate_is_recorded_and_not_accepted(tmp_path: Path) -> None:
    pem = hostile.certificate(tmp_path)
    with serving(hostile.honest, pem=pem) as server:
        folder = Folder(tmp_path / "images", [Prompt(0, "A cat", f"{server.url}/a.jpg")])
        folder.collector.collect({"url": web_archives.original})
        assert folder.statuses() == ["tls"]
        assert "self-signed certificate" in folder.log.attempts()[0][3]
        assert folder.files() == {}
        assert not server.hits
        trusting = make_fetcher(ssl_context=ssl.create_default_context(cafile=pem))
        assert trusting.fetch(f"{server.url}/a.jpg").body == hostile.GOOD


def test_a_redirect_to_a_private_address_opens_no_connection(tmp_path: Path) -> None:
    with (
        serving(hostile.honest, address="127.0.0.2") as inner,
        serving(hostile.redirects_to(f"{inner.url}/secret.jpg")) as outer,
    ):
        folder = Folder(tmp_path, [Prompt(0, "A cat", f"{outer.url}/a.jpg")])
        folder.collector.collect({"url": web_archives.original})
        assert folder.statuses() == ["blocked_address"]
        assert "127.0.0.2" in folder.log.attempts()[0][3]
        assert not inner.hits
        assert folder.files() == {}


@pytest.mark.parametrize(
    ("case", "answers"),
    [
        ("a private address", ["10.0.0.1"]),
        ("a private address among public ones", ["93.184.216.34", "127.0.0.2"]),
        ("a mapped loopback address", ["::ffff:127.0.0.2"]),
    ],
)
def test_a_name_is_judged_by_all_of_its_addresses(case: str, answers: list[str]) -> None:
    with pytest.raises(FetchError) as caught:
        make_fetcher(resolve=lambda *_: answers).fetch("http://pictures.example/a.jpg")
    assert caught.value.status == "blocked_address", case


def test_a_name_that_changes_between_check_and_connection_gains_nothing() -> None:
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    with serving(hostile.honest) as server:
        port = urlsplit(server.url).port
        fetcher = make_fetcher(resolve=rebinding)
        assert fetcher.fetch(f"http://rebinding.example:{port}/").body == hostile.GOOD
    assert asked == ["rebinding.example"]


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://127.0.0.1/a.jpg", "file:///etc/passwd", "no address", "http://", "http://[::1"),
        *("http://127.0.0.1:0/a.jpg", "http://127.0.0.1:65536/a.jpg"),
    ],
)
def test_only_web_addresses_are_asked(url: str) -> None:
    with pytest.raises(FetchError) as caught:
        make_fetcher().fetch(url)
    assert caught.value.status == "bad_url"


def test_a_name_that_cannot_be_decoded_is_asked_all_the_same() -> None:
    """An underscore is no part of an international name, but of names that are in use."""
    with serving(hostile.honest) as server:
        port = urlsplit(server.url).port
        fetcher = make_fetcher(resolve=lambda *_: ["127.0.0.1"])
        assert fetcher.fetch(f"http://a_b.xn--p1ai:{port}/").body == hostile.GOOD


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("64:ff9b::5db8:d822", True),  # 93.184.216.34 behind NAT64
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::a00:1", False),
        ("2002:a00:1::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_without_the_flag_loopback_is_not_asked() -> None:
    with serving(hostile.honest) as server:
        with pytest.raises(FetchError) as caught:
            Fetcher(LIMITS).fetch(server.url)
        assert caught.value.status == "blocked_address"
        assert not server.hits


def test_a_file_is_not_fetched_over_http_after_https(tmp_path: Path) -> None:
    pem = hostile.certificate(tmp_path)
    with (
        serving(hostile.honest) as plain,
        serving(hostile.redirects_to(plain.url), pem=pem) as secure,
    ):
        trusted = ssl.create_default_context(cafile=pem)
        assert make_fetcher(ssl_context=trusted).fetch(secure.url).url.startswith("http:")
        with pytest.raises(FetchError, match="redirects from https to http"):
            make_fetcher(ssl_context=trusted, stay_secure=True).fetch(secure.url)


def test_a_gzip_bomb_costs_little_memory() -> None:
    with serving(hostile.zip_bomb) as server:
        tracemalloc.start()
        with pytest.raises(FetchError):
            make_fetcher(replace(LIMITS, max_bytes=2**18)).fetch(server.url)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * MEGABYTE  # the bomb itself holds 64 MiB


def test_requests_to_one_host_are_bounded(tmp_path: Path) -> None:
    at_once, most, lock = 0, 0, threading.Lock()

    def counting(talk: Talk) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        talk.wait(0.03)
        with lock:
            at_once -= 1
        talk.say(response(picture(int(talk.path[1:]))))

    with serving(counting) as server:
        prompts = [Prompt(row, f"word{row}", f"{server.url}/{row}") for row in range(12)]
        folder = Folder(tmp_path, prompts, make_fetcher(replace(LIMITS, per_host=2)))
        folder.collector.collect({"url": web_archives.original})
    assert len(folder.files()) == 12
    assert most == 2


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited before each request, or between two tries."""
    seconds: list[float] = []
    monkeypatch.setattr("utils.downloads.time.sleep", seconds.append)
    return seconds


def test_a_pause_lies_between_two_requests_to_one_host(waits: list[float]) -> None:
    """Also where it is longer than the longest wait that a server may ask for."""
    with serving(hostile.honest) as server, serving(hostile.honest) as other:
        fetcher = make_fetcher(replace(LIMITS, pause=5, longest_wait=2))
        for url in (f"{server.url}/a.jpg", f"{server.url}/b.jpg", f"{other.url}/a.jpg"):
            fetcher.fetch(url)
    first, second, elsewhere = waits
    assert first == elsewhere == 0
    assert 5 - LIMITS.seconds < second <= 5  # from start to start


def test_a_host_that_wants_to_be_left_alone_is_not_asked_again(waits: list[float]) -> None:
    with serving(ONE_HOUR) as server:
        fetcher, statuses = make_fetcher(), []
        for path in ("a.jpg", "b.jpg"):
            with pytest.raises(FetchError) as caught:
                fetcher.fetch(f"{server.url}/{path}")
            statuses.append(caught.value.status)
    assert statuses == ["http_429", "host_busy"]
    assert server.hits == {"/a.jpg": 1}
    assert waits == [0]


def test_a_dead_host_is_left_alone_after_a_while() -> None:
    fetcher = make_fetcher(replace(LIMITS, tries=1, host_failures=3))
    statuses = []
    for _ in range(5):
        with pytest.raises(FetchError) as caught:
            fetcher.fetch("http://127.0.0.1:9/a.jpg")
        statuses.append(caught.value.status)
    assert statuses == ["unreachable"] * 3 + ["host_down"] * 2


# Places.


def warc_record(body: bytes) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + body
    head = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: %d\r\n\r\n" % len(http)
    return gzip.compress(head + http + b"\r\n\r\n", mtime=0)


class Archive:
    """All archives behind one server, as the real ones answer. ``holdings`` says which place has
    the picture of which link; ``asked`` lists the requests."""

    def __init__(self, holdings: dict[str, dict[str, bytes]]) -> None:
        self.holdings = holdings
        self.asked: list[str] = []

    def __call__(self, talk: Talk) -> None:
        path = urlsplit(talk.path).path
        link = parse_qs(urlsplit(talk.path).query).get("url", [""])[0]
        found = {place: link in held for place, held in self.holdings.items()}
        self.asked.append(path)
        if path == "/cdx/search/cdx":
            table = [["timestamp", "original"]] if found["wayback"] else []
            if found["wayback"]:
                table += [["20100101000000", "http://lost.example/"], ["20201231000000", link]]
            talk.say(response(json.dumps(table).encode()))
        elif path == "/wayback/cdx":
            line = json.dumps({"timestamp": "20190101000000", "url": link, "status": "200"})
            talk.say(response(line.encode() if found["arquivo"] else b""))
        elif path.endswith("-index"):
            if not (found["commoncrawl"] and path == "/CC-B-index"):
                talk.say(response(b'{"message": "No Captures found"}', "404 Not Found"))
                return
            length = len(warc_record(self.holdings["commoncrawl"][link]))
            record = {"filename": "crawl-data/x.warc.gz", "offset": "7", "length": str(length)}
            talk.say(response(json.dumps(record).encode()))
        elif path == "/crawl-data/x.warc.gz":
            (body,) = self.holdings["commoncrawl"].values()
            start, end = talk.headers["range"].removeprefix("bytes=").split("-")
            data = (b"x" * 7 + warc_record(body) + b"y" * 7)[int(start) : int(end) + 1]
            talk.say(response(data, "206 Partial Content"))
        elif "id_/" in path:
            place = "wayback" if path.startswith("/web/") else "arquivo"
            held = self.holdings[place].get(talk.path.partition("id_/")[2])
            talk.say(response(held) if held else response(b"", "404 Not Found"))
        else:
            talk.say(response(b"", "404 Not Found"))


def places(server: hostile.Server, local: Path) -> dict[str, web_archives.Place]:
    return {
        "url": web_archives.original,
        "wayback": web_archives.wayback(server.url),
        "arquivo": web_archives.arquivo(server.url),
        "commoncrawl": web_archives.common_crawl(
            server.url, server.url, ["CC-A", "CC-B"], MEGABYTE
        ),
        "local": web_archives.local_folder(local, MEGABYTE),
    }


def test_places_are_asked_in_turn_and_the_source_is_recorded(tmp_path: Path) -> None:
    def link(row: int) -> str:
        return f"{server.url}/dead/{row}.jpg?x=1&y=ü"

    archive = Archive({})
    with serving(archive) as server:
        archive.holdings |= {
            "wayback": {link(0): picture(10)},
            "arquivo": {link(1): picture(11)},
            "commoncrawl": {link(2): picture(12)},
        }
        # What the server sees of a link inside a path is percent-encoded.
        for place in ("wayback", "arquivo"):
            archive.holdings[place] |= {
                url.replace("ü", "%C3%BC"): body for url, body in archive.holdings[place].items()
            }
        local = tmp_path / "mine"
        local.mkdir()
        (local / "0003_mine.png").write_bytes(picture(13, kind="PNG"))
        prompts = [Prompt(row, f"word{row}", link(row)) for row in range(5)]
        folder = Folder(tmp_path / "images", prompts)
        folder.collector.collect(places(server, local))
        report = folder.collector.report()
    kept = folder.log.images()
    sources = {0: "wayback", 1: "arquivo", 2: "commoncrawl", 3: "local"}
    assert {row: image.source for row, image in kept.items()} == sources
    for row in range(3):
        assert image_path(folder.path, row).read_bytes() == picture(10 + row)
    assert image_path(folder.path, 3).read_bytes() == picture(13, kind="PNG")
    # Nearest in time first; the stage ends with the first picture.
    assert "20201231000000" in kept[0].url
    assert not any("20100101000000" in path for path in archive.asked)
    stages = [stage for row, stage, *_ in folder.log.attempts() if row == 4]
    assert list(dict.fromkeys(stages)) == list(places(server, local))
    assert folder.statuses(4) == [
        *("http_404", "index", "no_capture", "index", "no_capture"),
        *("http_404", "http_404", "no_capture", "no_capture"),
    ]
    assert [stage for row, stage, *_ in folder.log.attempts() if row == 0][-1] == "wayback"
    assert "4 of 5 training images" in report
    assert "1 missing: rows 4" in report
    _, table = read_table(folder.path / "training_images.csv")
    assert [row["Source"] for row in table] == [*sources.values(), ""]
    assert table[4]["Missing"].startswith("url: http_404")
    assert table[0]["sha256"] == sha256(picture(10)).hexdigest()


@pytest.mark.parametrize(
    "answer",
    [
        *(b"<html>busy</html>", b'{"a": 1}', b"[[1, 2, 3]]", b"[[]]", b"\xff", b"[" * 100_000),
        b'[["timestamp", "original"], ["20200101000000", "http://x/\\ud800"]]',
    ],
)
def test_an_index_that_answers_nonsense_is_recorded(tmp_path: Path, answer: bytes) -> None:
    with serving(lambda talk: talk.say(response(answer))) as server:
        folder = Folder(tmp_path, [Prompt(0, "A cat", f"{server.url}/a.jpg")])
        folder.collector.collect({"wayback": web_archives.wayback(server.url)})
        assert folder.statuses() == ["index", "bad_index"]


@pytest.mark.parametrize(
    "answer",
    [
        b'{"filename": "x", "offset": 1e999, "length": 1}',
        b'{"filename": "\\ud800", "offset": 0, "length": 1}',
    ],
)
def test_a_crawl_that_answers_nonsense_is_recorded(tmp_path: Path, answer: bytes) -> None:
    with serving(lambda talk: talk.say(response(answer))) as server:
        folder = Folder(tmp_path, [Prompt(0, "A cat", f"{server.url}/a.jpg")])
        place = web_archives.common_crawl(server.url, server.url, ["CC-A"], MEGABYTE)
        folder.collector.collect({"commoncrawl": place})
        assert folder.statuses() == ["index", "bad_index"]


def test_a_crawl_that_fails_does_not_hide_the_others(tmp_path: Path) -> None:
    """The second crawl has one picture of two; the other row is asked for again in a later run."""
    archive = Archive({"wayback": {}, "arquivo": {}})

    def behaviour(talk: Talk) -> None:
        busy = talk.path.startswith("/CC-A-index")
        talk.say(response(b"", "503 Busy")) if busy else archive(talk)

    with serving(behaviour) as server:
        links = [f"{server.url}/dead/{row}" for row in range(2)]
        archive.holdings["commoncrawl"] = {links[0]: picture(12)}
        prompts = [Prompt(row, f"word{row}", links[row]) for row in range(2)]
        folder = Folder(tmp_path, prompts)
        folder.collector.collect({"commoncrawl": places(server, tmp_path)["commoncrawl"]})
    assert folder.files() == {"0000_first_image.jpg": picture(12)}
    assert folder.statuses(1) == ["http_503", "http_503", "http_404"]
    assert folder.log.finished() == set()


@pytest.mark.parametrize(
    ("record", "status"),
    [
        (b"no gzip", "bad_encoding"),
        (warc_record(b"x")[:-12], "broken"),
        (warc_record(bytes(2 * MEGABYTE)), "too_large"),
        (gzip.compress(b"WARC/1.0\r\n\r\nHTTP/1.1 404 Not Found\r\n\r\nx", mtime=0), "bad_index"),
        (
            gzip.compress(
                b"WARC/1.0\r\nWARC-Truncated: length\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx", mtime=0
            ),
            "broken",
        ),
        (warc_record(b"x"), None),
    ],
)
def test_warc_records(record: bytes, status: str | None) -> None:
    if status is None:
        assert web_archives.warc_payload(record, MEGABYTE) == b"x"
        return
    with pytest.raises(FetchError) as caught:
        web_archives.warc_payload(record, MEGABYTE)
    assert caught.value.status == status


def test_final_answers_are_not_asked_again_and_passing_ones_are(tmp_path: Path) -> None:
    def behaviour(talk: Talk) -> None:
        lost = talk.path == "/lost"
        talk.say(response(b"", "404 Not Found" if lost else "503 Busy"))

    with serving(behaviour) as server:
        prompts = [Prompt(0, "One", f"{server.url}/lost"), Prompt(1, "Two", f"{server.url}/busy")]
        not_asked = []
        for _ in range(2):
            folder = Folder(tmp_path, prompts)
            not_asked.append(folder.collector.collect({"url": web_archives.original}))
            folder.log.close()
        assert not_asked == [0, 1]
        assert server.hits == {"/lost": 1, "/busy": 2 * LIMITS.tries}
        folder = Folder(tmp_path, prompts)
        folder.log.forget_finished()
        assert folder.collector.collect({"url": web_archives.original}) == 0
        assert server.hits["/lost"] == 2


def test_own_files_are_counted_and_left_alone(tmp_path: Path) -> None:
    prompts = [Prompt(0, "One", "http://127.0.0.1:9/")]
    folder = Folder(tmp_path, prompts)
    image_path(tmp_path, 0).write_bytes(picture(5))
    folder.collector.collect({"url": web_archives.original})
    assert folder.log.images()[0].source == "own"
    assert image_path(tmp_path, 0).read_bytes() == picture(5)
    image_path(tmp_path, 0).write_bytes(b"no picture")
    with pytest.raises(InputError, match="not_an_image"):
        folder.collector.collect({"url": web_archives.original})
    with pytest.raises(InputError, match="another run"):
        AttemptLog(tmp_path / "attempts.sqlite", "prompts")
    folder.log.close()
    with pytest.raises(InputError, match="belongs to a prompt file"):
        AttemptLog(tmp_path / "attempts.sqlite", "other prompts")


def test_one_run_at_a_time_has_the_log(tmp_path: Path) -> None:
    """Also where all tables are there and nothing is written yet."""
    path = tmp_path / "attempts.sqlite"
    AttemptLog(path, "prompts").close()
    log = AttemptLog(path, "prompts")
    with pytest.raises(InputError, match="another run"):
        AttemptLog(path, "prompts")
    log.close()


def test_what_is_no_log_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unable to open"):
        AttemptLog(tmp_path, "prompts")
    foreign = tmp_path / "foreign.sqlite"
    base = sqlite3.connect(foreign)
    base.execute("CREATE TABLE about (words TEXT)")
    base.close()
    with pytest.raises(InputError, match="no such column"):
        AttemptLog(foreign, "prompts")


# Placeholders.

SAME, OTHER = picture(20), picture(21)
CATS = ["A cat", "Blue rug"]
SHOP = ["Shop oak floor 12", "Shop red carpet", "Shop grey tile"]
RUGS = ["Blue rug by Ann", "Blue rug by Bob"]
STOP = ["The cat on the mat", "A rug with the dog"]
SHIFTED = [picture(20, size=256, quality=quality) for quality in (60, 75, 95)]
RESIZED = [picture(20, size=256), picture(20, size=800)]

PLACEHOLDERS = [
    ("same bytes, captions without a common word", CATS, [SAME] * 2, True),
    ("same bytes, only small words in common", STOP, [SAME] * 2, True),
    ("recompressed, captions without a common word", CATS, SHIFTED[:2], True),
    ("resized, captions without a common word", CATS, RESIZED, True),
    ("different pictures", CATS, [SAME, OTHER], False),
    ("same bytes, variants of a caption", RUGS, [SAME] * 2, False),
    ("same bytes for three products of a shop", SHOP, [SAME] * 3, True),
    ("same bytes for two products of a shop", SHOP[:2], [SAME] * 2, False),
    ("near-duplicates of one template", SHOP, SHIFTED, False),
]


@pytest.mark.parametrize(
    ("captions", "pictures", "expected"),
    [case[1:] for case in PLACEHOLDERS],
    ids=[case[0] for case in PLACEHOLDERS],
)
def test_placeholders(captions: list[str], pictures: list[bytes], expected: bool) -> None:
    rows = range(len(captions))
    groups = placeholders(
        dict(zip(rows, captions, strict=True)),
        {row: sha256(pictures[row]).hexdigest() for row in rows},
        {row: inspect(pictures[row], max_pixels=10**6).thumbnail for row in rows},
    )
    assert groups == ([set(rows)] if expected else [])


def test_different_prints_on_one_template_are_not_near_duplicates() -> None:
    from PIL import Image, ImageDraw

    def shirt(text: str, quality: int = 90) -> bytes:
        image = Image.new("RGB", (400, 400), "white")
        draw = ImageDraw.Draw(image)
        draw.polygon([(80, 60), (320, 60), (380, 150), (310, 170), (310, 370), (90, 370)], "navy")
        draw.text((140, 180), text, "white", font_size=40)
        file = BytesIO()
        image.save(file, "JPEG", quality=quality)
        return inspect(file.getvalue(), max_pixels=10**6).thumbnail

    assert near(shirt("Happier"), shirt("Happier", quality=30))
    assert not near(shirt("Happier"), shirt("Mappier"))


def test_placeholders_are_dropped_and_their_rows_go_on(tmp_path: Path) -> None:
    """The live server sends one picture for every lost one; the archive has three of four, and the
    placeholder for the fourth."""
    gone = picture(30)
    archive = Archive({"wayback": {}, "arquivo": {}, "commoncrawl": {}})

    def behaviour(talk: Talk) -> None:
        if talk.path.startswith("/live/"):
            talk.say(response(picture(40) if talk.path == "/live/4" else gone))
        else:
            archive(talk)

    captions = ["Red cat", "Blue rug", "Green hat", "Old ship", "New moon"]
    with serving(behaviour) as server:
        links = [f"{server.url}/live/{row}" for row in range(5)]
        archive.holdings["wayback"] = {links[row]: picture(50 + row) for row in range(3)}
        archive.holdings["wayback"][links[3]] = gone
        prompts = [Prompt(row, captions[row], links[row]) for row in range(5)]
        folder = Folder(tmp_path, prompts)
        stages = places(server, tmp_path)
        folder.collector.collect({name: stages[name] for name in ("url", "wayback")})
        again = dict(server.hits)
        folder.collector.collect({name: stages[name] for name in ("url", "wayback")})
        assert dict(server.hits) == again  # nothing is asked twice
    assert {row: image.source for row, image in folder.log.images().items()} == {
        **dict.fromkeys(range(3), "wayback"),
        4: "url",
    }
    assert sorted(folder.files()) == [f"000{row}_first_image.jpg" for row in (0, 1, 2, 4)]
    assert folder.statuses(3)[:2] == ["ok", "placeholder"]
    assert folder.statuses(3)[-2:] == ["placeholder", "http_404"]
    assert "3" in folder.collector.report().partition("missing: rows")[2]


def test_a_picture_unmasked_by_a_later_place_is_looked_for_there_too(tmp_path: Path) -> None:
    """One row has a placeholder from the live server; only the archive's copy of it under another
    row shows that it is one, and then the first row is asked for in the archive as well."""
    gone, archive = picture(30), Archive({"arquivo": {}, "commoncrawl": {}})

    def behaviour(talk: Talk) -> None:
        talk.say(response(gone)) if talk.path == "/live/0" else archive(talk)

    with serving(behaviour) as server:
        links = [f"{server.url}/live/{row}" for row in range(2)]
        archive.holdings["wayback"] = {links[0]: picture(50), links[1]: gone}
        prompts = [Prompt(row, CATS[row], links[row]) for row in range(2)]
        folder = Folder(tmp_path, prompts)
        stages = places(server, tmp_path)
        folder.collector.collect({name: stages[name] for name in ("url", "wayback")})
    assert folder.files() == {"0000_first_image.jpg": picture(50)}


def test_a_known_placeholder_is_dropped_though_it_came_first(tmp_path: Path) -> None:
    """Alone, row 0 keeps what two other rows show to be a placeholder in a later run."""
    captions = ["Red cat", "Blue rug", "Green hat"]
    with serving(lambda talk: talk.say(response(picture(30)))) as server:
        prompts = [Prompt(row, captions[row], f"{server.url}/{row}") for row in range(3)]
        for chosen in (prompts[:1], prompts[1:], prompts):
            folder = Folder(tmp_path, chosen)
            folder.collector.collect({"url": web_archives.original})
            statuses, files = folder.statuses(0), folder.files()
            folder.log.close()
    assert statuses == ["ok", "placeholder"]
    assert files == {}
    assert sum(server.hits.values()) == 3


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", "not_an_image"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "not_an_image"),
        (picture(1, kind="PNG")[:-200], "undecodable"),
        (picture(1, size=49), "tiny"),
        (picture(1, size=1001), "too_many_pixels"),
    ],
)
def test_bytes_that_are_no_training_image(data: bytes, status: str) -> None:
    with pytest.raises(PictureError) as caught:
        inspect(data, max_pixels=10**6)
    assert caught.value.status == status


# Files.

CONTENT = b"".join(b"%d\n" % number for number in range(100_000))
FILE = PinnedFile("folder/file.csv", "", sha256(CONTENT).hexdigest())


def ranged(content: bytes, *, etag: str = '"1"', drop: int | None = None) -> hostile.Behaviour:
    """Serves a file with ranges; the first answer breaks off after ``drop`` bytes."""

    def behaviour(talk: Talk) -> None:
        start = int(talk.headers.get("range", "bytes=0-")[6:-1])
        if talk.headers.get("if-range", etag) != etag:
            start = 0
        rest = content[start:]
        head = response(
            b"",
            "206 Partial Content" if start else "200 OK",
            Content_Length=len(rest),
            ETag=etag,
            Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}",
        )
        talk.say(head + (rest[:drop] if talk.hit == 1 and drop else rest))

    return behaviour


def fetch_file(shelf: Shelf, file: PinnedFile, server: hostile.Server, **limits: Any) -> str:
    file = replace(file, url=f"{server.url}/file")
    return shelf.get(file, make_fetcher(replace(LIMITS, **limits)), lambda *_: None)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    shelf, seen = Shelf(tmp_path, tmp_path / "lock.json"), []
    serve = ranged(CONTENT, drop=200_000)

    def watched(talk: Talk) -> None:
        seen.append(talk.headers.get("range"))
        serve(talk)

    with serving(watched) as server:
        assert fetch_file(shelf, FILE, server) == "fetched, sha256 as pinned"
    assert seen == [None, "bytes=200000-"]
    assert (tmp_path / FILE.path).read_bytes() == CONTENT
    assert names(tmp_path) == [FILE.path]
    assert shelf.has(FILE)


def test_a_file_that_changed_meanwhile_begins_anew(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, tmp_path / "lock.json")
    with serving(ranged(b"old" * 9999, etag='"0"', drop=9999)) as server:
        with pytest.raises(FetchError, match="broken"):
            fetch_file(shelf, FILE, server, tries=1)
        assert not shelf.has(FILE)
    with serving(ranged(CONTENT)) as server:
        fetch_file(shelf, FILE, server)
    assert (tmp_path / FILE.path).read_bytes() == CONTENT


def test_a_shorter_range_than_asked_for_is_not_the_whole_file(tmp_path: Path) -> None:
    def stingy(talk: Talk) -> None:
        start = int(talk.headers.get("range", "bytes=0-")[6:-1])
        part = CONTENT[start : start + 250_000]
        head = response(
            b"",
            "206 Partial Content" if start else "200 OK",
            Content_Length=len(part) if start else len(CONTENT),
            ETag='"1"',
            Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(CONTENT)}",
        )
        talk.say(head + part)

    with serving(stingy) as server:
        file = replace(FILE, sha256=None)
        fetch_file(Shelf(tmp_path, tmp_path / "lock.json"), file, server, tries=3)
    assert (tmp_path / FILE.path).read_bytes() == CONTENT
    assert server.hits == {"/file": 3}


def test_a_range_that_was_not_asked_for_is_not_appended(tmp_path: Path) -> None:
    def confused(talk: Talk) -> None:
        if talk.hit == 1:
            talk.say(response(CONTENT[:9999], Content_Length=len(CONTENT), ETag='"1"'))
        elif "range" in talk.headers:
            span = f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"
            talk.say(response(CONTENT, "206 Partial Content", Content_Range=span))
        else:
            talk.say(response(CONTENT))

    with serving(confused) as server:
        fetch_file(Shelf(tmp_path, tmp_path / "lock.json"), FILE, server, tries=3)
    assert (tmp_path / FILE.path).read_bytes() == CONTENT


def test_an_answer_that_is_refused_does_not_vouch_for_older_bytes(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, tmp_path / "lock.json")
    with (
        serving(ranged(b"old" * 9999, etag='"0"', drop=9999)) as server,
        pytest.raises(FetchError, match="broken"),
    ):
        fetch_file(shelf, FILE, server, tries=1)
    compressed = response(CONTENT, ETag='"1"', Content_Encoding="gzip")
    with (
        serving(lambda talk: talk.say(compressed)) as server,
        pytest.raises(FetchError, match="bad_encoding"),
    ):
        fetch_file(shelf, FILE, server)
    with serving(ranged(CONTENT, etag='"1"')) as server:
        fetch_file(shelf, FILE, server)
    assert (tmp_path / FILE.path).read_bytes() == CONTENT


def test_a_mark_that_cannot_be_said_in_a_request_is_none(tmp_path: Path) -> None:
    with serving(ranged(CONTENT, etag='"é"', drop=9999)) as server:
        fetch_file(Shelf(tmp_path, tmp_path / "lock.json"), FILE, server)
    assert (tmp_path / FILE.path).read_bytes() == CONTENT


def test_two_runs_do_not_fetch_one_file_at_a_time(tmp_path: Path) -> None:
    lock, serve = tmp_path / "lock.json", ranged(CONTENT)
    refused: list[str] = []

    def meanwhile(talk: Talk) -> None:
        if talk.hit == 1:
            try:
                fetch_file(Shelf(tmp_path, lock), FILE, server)
            except InputError as error:
                refused.append(str(error))
        serve(talk)

    with serving(meanwhile) as server:
        assert fetch_file(Shelf(tmp_path, lock), FILE, server) == "fetched, sha256 as pinned"
    (message,) = refused
    assert "another run is fetching it" in message
    assert names(tmp_path) == [FILE.path]


def test_what_another_run_pinned_meanwhile_stays_pinned(tmp_path: Path) -> None:
    lock, file = tmp_path / "lock.json", replace(FILE, sha256=None)
    first, second = Shelf(tmp_path, lock), Shelf(tmp_path, lock)
    with serving(ranged(CONTENT)) as server:
        fetch_file(first, file, server)
        fetch_file(second, replace(file, path="folder/other.csv"), server)
    assert set(json.loads(lock.read_text())) == {file.path, "folder/other.csv"}


def test_a_wrong_sum_is_refused_and_not_kept(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, tmp_path / "lock.json")
    with serving(ranged(CONTENT + b"!")) as server, pytest.raises(FetchError) as caught:
        fetch_file(shelf, FILE, server)
    assert caught.value.status == "wrong_sum"
    assert names(tmp_path) == []
    path = tmp_path / FILE.path
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="move it away"):
        shelf.has(FILE)
    assert path.read_bytes() == b"mine"


def test_without_a_published_sum_the_first_download_is_the_pin(tmp_path: Path) -> None:
    lock, file = tmp_path / "lock.json", replace(FILE, sha256=None)
    with serving(ranged(CONTENT)) as server:
        assert "pinned on first use" in fetch_file(Shelf(tmp_path, lock), file, server)
    assert json.loads(lock.read_text())[file.path]["sha256"] == FILE.sha256
    path = tmp_path / file.path
    assert Shelf(tmp_path, lock).has(file)
    path.write_bytes(b"another")
    with pytest.raises(InputError, match="pinned is"):
        Shelf(tmp_path, lock).has(file)
    path.unlink()
    with serving(ranged(CONTENT[1:])) as server, pytest.raises(FetchError, match="wrong_sum"):
        fetch_file(Shelf(tmp_path, lock), file, server)
    path.write_bytes(CONTENT)
    lock.unlink()
    shelf = Shelf(tmp_path, lock)
    assert shelf.has(file) and not lock.exists()
    assert "pinned on first use" in (shelf.adopt(file) or "")
    assert shelf.adopt(file) is None


def test_a_page_in_the_place_of_a_network_is_not_pinned(tmp_path: Path) -> None:
    """Nor one that lies there already, or a Git LFS pointer."""
    file = replace(FILE, sha256=None, min_bytes=2 * len(CONTENT))
    shelf = Shelf(tmp_path, tmp_path / "lock.json")
    with serving(ranged(CONTENT)) as server, pytest.raises(FetchError, match="wrong_size"):
        fetch_file(shelf, file, server)
    assert names(tmp_path) == []
    (tmp_path / file.path).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="42 bytes cannot be this file; move it away"):
        shelf.has(file)


def test_an_archive_is_unpacked_and_removed(tmp_path: Path) -> None:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("val/1.jpg", "val/2.jpg", "val/notes.txt", "../val/3.jpg", "/val/4.jpg"):
            archive.writestr(name, name * 100)
    content = buffer.getvalue()
    file = PinnedFile("coco/val.zip", "", sha256(content).hexdigest(), members=r"val/\d\.jpg")
    shelf = Shelf(tmp_path, tmp_path / "lock.json")
    with serving(ranged(content)) as server:
        assert fetch_file(shelf, file, server).endswith("2 files unpacked")
        assert names(tmp_path) == ["coco/val/1.jpg", "coco/val/2.jpg", "lock.json"]
        assert shelf.has(file)
        (tmp_path / "coco/val/2.jpg").unlink()
        assert not shelf.has(file)
        # Killed between fetching and unpacking: the zip is there, and is not fetched again.
        (tmp_path / file.path).write_bytes(content)
        assert not shelf.has(file)
        assert fetch_file(shelf, file, server) == "unpacked, 2 files unpacked"
    assert sum(server.hits.values()) == 1
    assert shelf.has(file)


# The command.


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "prompts" / "download.py"), *map(str, arguments)]


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, cwd=cwd)


def pictures_server(talk: Talk) -> None:
    row = int(talk.path.rpartition("/")[2])
    talk.wait(0.02)
    if row % 5 == 3:
        talk.say(response(b"", "404 Not Found"))
    elif row % 5 == 4:  # a placeholder for all that is lost
        talk.say(response(picture(99)))
    else:
        talk.say(response(picture(row)))


def write_prompts(path: Path, server: hostile.Server, count: int) -> Path:
    rows = [(row, f"caption{row}", f"{server.url}/{row}") for row in range(count)]
    write_table(path, ["", "Caption", "URL"], rows)
    return path


def image_options(server: hostile.Server, prompts: Path, output: Path) -> list[object]:
    options = ["--stages=url", "--pause=0", "--allow_network=127.0.0.1", "--back_off=0.01"]
    return ["training_images", "-p", prompts, "-o", output, *options]


def test_killed_and_restarted_it_ends_with_the_same_files(tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if not path.name.startswith("attempts.sqlite")
        }

    with serving(pictures_server) as server:
        prompts = write_prompts(tmp_path / "prompts.csv", server, 60)
        whole = run(*image_options(server, prompts, tmp_path / "whole"))
        assert whole.returncode == 0, whole.stderr
        options = image_options(server, prompts, tmp_path / "killed")
        images = tmp_path / "killed" / "original_images"
        for wanted in (5, 20):
            process = subprocess.Popen(
                command(*options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            deadline = time.monotonic() + 20
            while len(list(images.glob("0*.jpg"))) < wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        again = run(*options)
        assert again.returncode == 0, again.stderr
        assert "24 missing rows were not asked for" in run(*options).stderr
    expected = files(tmp_path / "whole" / "original_images")
    assert files(images) == expected
    assert len(expected) == 36 + 1  # and the report
    assert "36 of 60 training images" in whole.stdout
    assert whole.stdout.replace("/whole/", "/killed/") == again.stdout


def test_an_interrupted_run_ends_at_once(tmp_path: Path) -> None:
    """And what it had said is not lost."""
    for name in ("mixup", "large"):
        with (tmp_path / f"sscd_disc_{name}.torchscript.pt").open("wb") as file:
            file.truncate(20 * MEGABYTE)
    with serving(hostile.hangs) as server:
        prompts = write_prompts(tmp_path / "prompts.csv", server, 3)
        process = subprocess.Popen(
            command("sscd", *image_options(server, prompts, tmp_path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a suite that was started in the background ignores it, and its children with it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        deadline = time.monotonic() + 20
        while not server.hits and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=5)
    assert process.returncode == 130
    assert output.count("pinned on first use") == 2
    assert errors.splitlines()[-1].endswith("the same command goes on from here")


def test_a_log_that_cannot_be_written_ends_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "original_images" / "attempts.sqlite"
    path.parent.mkdir()
    base = sqlite3.connect(path)
    base.execute("CREATE TABLE attempts (id INTEGER PRIMARY KEY)")
    base.close()
    with serving(pictures_server) as server:
        prompts = write_prompts(tmp_path / "prompts.csv", server, 1)
        done = run(*image_options(server, prompts, tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "download.py: table attempts has no column" in done.stderr.splitlines()[-1]


def test_a_dry_run_lists_and_neither_asks_nor_writes(tmp_path: Path) -> None:
    def tree() -> list[str]:
        return sorted(map(str, tmp_path.rglob("*")))

    with serving(pictures_server) as server:
        prompts = write_prompts(tmp_path / "prompts.csv", server, 3)
        before = tree()
        done = run("--dry_run", "-o", tmp_path, "-p", prompts, f"--release_url={server.url}")
        assert not server.hits
    assert done.returncode == 0, done.stderr
    assert tree() == before
    for words in (
        "prompts/memorized_laion_prompts.csv",
        "statistics_additional_laion_prompts_v1_4.pt",
        "sscd_disc_mixup.torchscript.pt",
        "none published: pinned on first use",
        "coco/val2014.zip",
        "3 training images",
        server.url,
    ):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["everything"], "'everything' is no part"),
        (["training_images"], "fetch the part 'prompts' first"),
        (["training_images", "--stages=url,google"], "'google' is none of"),
        (["training_images", "--local_images=nowhere"], "no such folder"),
        (["training_images", "--stages=local"], "need each other"),
        (["training_images", "-p", "no_links.csv"], "no links in a column 'URL'"),
        (["training_images", "-p", "links.csv", "--rows=7"], "no row 7"),
        (["training_images", "--crawls=CC-MAIN-2021"], "'CC-MAIN-2021' is no crawl's name"),
        (["training_images", "--crawls="], "'' is no crawl's name"),
        (["prompts", "--release_url=ftp://x"], "does not begin with https://"),
        (["prompts", "--allow_network=10.0.0.1/8"], "host bits"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    write_table(tmp_path / "no_links.csv", ["", "Caption"], [(0, "A cat")])
    write_table(tmp_path / "links.csv", ["Caption", "URL"], [("A cat", "http://127.0.0.1:9/")])
    done = run("-o", tmp_path / "new", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_file_that_cannot_be_had_is_named_and_the_rest_is_fetched(tmp_path: Path) -> None:
    def behaviour(talk: Talk) -> None:
        talk.say(response(b"", "404 Not Found"))

    with serving(behaviour) as server:
        done = run(
            *("prompts", "-o", tmp_path, f"--release_url={server.url}", "--pause=0"),
            "--allow_network=127.0.0.1",
        )
    assert done.returncode == 1
    assert "additional_laion_prompts.csv" in done.stderr.splitlines()[-1]
    assert len(server.hits) == 4
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def release(talk: Talk) -> None:
    """The public release, with a stand-in for its largest file."""
    path = REAL_FILES / talk.path.rpartition("/")[2]
    assert "/f952eded64fca0bcf42e0bb3be9a01d64653cfdb/" in talk.path
    additional = b"Caption;URL\n" + b"words;http://x\n" * 100_000
    talk.say(response(path.read_bytes() if path.exists() else additional))


@pytest.mark.skipif(not REAL_FILES.is_dir(), reason="needs shared/laion")
def test_rows_that_fetched_prompts_do_not_have_leave_no_log(tmp_path: Path) -> None:
    with serving(release) as server:
        done = run(
            *("prompts", "training_images", "--rows=9999", "-o", tmp_path),
            *(f"--release_url={server.url}", "--pause=0", "--allow_network=127.0.0.1"),
        )
    assert done.returncode == 2
    assert "no row 9999" in done.stderr.splitlines()[-1]
    assert (tmp_path / "prompts" / "memorized_laion_prompts.csv").exists()
    assert not (tmp_path / "original_images").exists()


@pytest.mark.skipif(not REAL_FILES.is_dir(), reason="needs shared/laion")
def test_the_pinned_sums_are_those_of_the_release(tmp_path: Path) -> None:
    with serving(release) as server:
        options = [
            *("prompts", "statistics", "-o", tmp_path, f"--release_url={server.url}"),
            *("--pause=0", "--allow_network=127.0.0.1"),
        ]
        done = run(*options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("sha256 as pinned") == 4
        assert done.stdout.count("pinned on first use") == 1
        again = run(*options)
        assert again.stdout.count("is there") == 5
    assert sum(server.hits.values()) == 5
    for path in REAL_FILES.iterdir():
        folder = "statistics" if path.suffix == ".pt" else "prompts"
        assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes()
    shutil.rmtree(tmp_path / "statistics")
    (tmp_path / "prompts" / "additional_laion_prompts.csv").write_bytes(b"changed")
    refused = run("prompts", "-o", tmp_path)
    assert refused.returncode == 2
    assert "pinned is" in refused.stderr


def test_the_help_is_the_docstring() -> None:
    done = run("-h")
    assert done.returncode == 0
    assert "python prompts/download.py prompts statistics" in done.stdout
