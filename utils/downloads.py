"""One HTTP GET that trusts no server: bounded in time, bytes and redirects, polite to each host.

Only http and https; every address that a name resolves to is checked before a socket is opened,
at every redirect, and the socket goes to the address that was checked. Certificates are verified.
A failure has a name (``FetchError.status``), whoever caused it.
Public: ``Limits``, ``FetchError``, ``Reply``, ``Fetcher``, ``is_public``, ``bounded_inflate``.
"""

import contextlib
import email.utils
import ipaddress
import re
import socket
import ssl
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpcore2
import httpx2
import tenacity

AGENT = "nemo-downloader/1.0 (research; one polite client)"
REDIRECTS = {301, 302, 303, 307, 308}
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that another try may mend
NAT64 = ipaddress.ip_network("64:ff9b::/96")
NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")  # translated within one network (RFC 8215)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
T = TypeVar("T")
Resolver = Callable[[str, int], list[str]]


@dataclass(frozen=True)
class Limits:
    """What one URL may cost."""

    seconds: float = 60.0  # one try, from the first connection to the last byte
    silence: float = 15.0  # for a connection, and between two reads
    max_bytes: int = 32 * 2**20  # after decompression
    redirects: int = 5
    tries: int = 3  # where a failure may pass
    back_off: float = 1.0  # before the second try; doubles
    longest_wait: float = 60.0  # the longest Retry-After that is waited for
    per_host: int = 2  # requests at a time
    pause: float = 1.0  # between the starts of two requests to one host
    host_failures: int = 20  # timeouts or refusals in a row after which a host is left alone


class FetchError(Exception):
    """Why a URL gave nothing.

    ``status`` is one of bad_url, blocked_address, unreachable, timeout, tls, broken, redirects,
    http_<code>, too_large, bad_encoding, host_busy, host_down; modules that read what was fetched
    add their own. ``passing`` says that another try, later, may succeed; ``url`` is the address
    asked for and ``received`` the number of bytes of the body that came.
    """

    url = ""
    received = 0

    def __init__(
        self,
        status: str,
        detail: str,
        *,
        passing: bool = False,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail, self.passing = status, detail, passing
        self.retry_after = retry_after


@dataclass(frozen=True)
class Reply:
    """A whole body, and the URL that sent it after redirects."""

    body: bytes
    url: str


Retried = Callable[[FetchError], None]


def _ignore(*_: object) -> None:
    pass


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; one IPv4 address inside an IPv6 one
    (mapped, 6to4, Teredo, NAT64) is judged by itself."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
        elif ip.is_site_local or ip in NAT64_LOCAL:
            return False
    return ip.is_global and not ip.is_multicast


def resolve_name(host: str, port: int) -> list[str]:
    """All addresses of a host name, in the system's order. OSError or UnicodeError if none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def bounded_inflate(chunks: Iterable[bytes], max_bytes: int) -> bytes:
    """Decompresses gzip or zlib data without ever holding more than ``max_bytes``. FetchError
    too_large, bad_encoding, or broken where the data ends early."""
    inflater = zlib.decompressobj(wbits=47)  # recognizes both formats
    body = bytearray()
    try:
        for chunk in chunks:
            body += inflater.decompress(chunk, max_bytes + 1 - len(body))
            if len(body) > max_bytes:
                raise FetchError("too_large", f"decompresses to more than {max_bytes:,} bytes")
    except zlib.error as error:
        raise FetchError("bad_encoding", f"cannot be decompressed: {error}") from None
    if not inflater.eof:
        raise FetchError("broken", "compressed data end early", passing=True)
    return bytes(body)


@dataclass
class _Clock:
    """The time left to one try, and what it has received."""

    deadline: float
    received: int = 0

    def left(self, timeout: float | None) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the time for the whole request is over")
        return left if timeout is None else min(left, timeout)


class _TimedStream(httpcore2.NetworkStream):
    """A socket on which no read may outlast the clock: a server that sends a byte now and then
    resets the silence timeout, never this."""

    def __init__(self, stream: httpcore2.NetworkStream, clock: _Clock) -> None:
        self._stream, self._clock = stream, clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._clock.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._clock.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        left = self._clock.left(timeout)
        stream = self._stream.start_tls(ssl_context, server_hostname, left)
        return _TimedStream(stream, self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _CheckedBackend(httpcore2.SyncBackend):
    """Opens sockets to checked addresses only. The name is resolved once, here, so that nothing
    can change between the check and the connection."""

    def __init__(self, addresses: Resolver, clock: _Clock) -> None:
        self._addresses, self._clock = addresses, clock

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *rest: Any, **options: Any
    ) -> httpcore2.NetworkStream:
        failure: Exception | None = None
        for address in self._addresses(host, port):
            try:
                left = self._clock.left(timeout)
                stream = super().connect_tcp(address, port, left, *rest, **options)
                return _TimedStream(stream, self._clock)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore2.ConnectError(f"{host} has no address")


@dataclass
class _Host:
    """What is known of one host (name and port) during a run."""

    slots: threading.Semaphore
    lock: threading.Lock = field(default_factory=threading.Lock)
    free_at: float = 0.0  # no request starts before: our own pauses
    left_alone_until: float = 0.0  # nor before: what the host asks for
    failures: int = 0  # in a row


class Fetcher:
    """Fetches URLs within ``limits``, from several threads at a time.

    ``allowed`` are networks that may be asked although they are not public. ``stay_secure``
    refuses a redirect from https to http. ``ssl_context`` and ``resolve`` replace the system's
    certificates and name service.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        allowed: Iterable[Network] = (),
        stay_secure: bool = False,
        ssl_context: ssl.SSLContext | None = None,
        resolve: Resolver = resolve_name,
    ) -> None:
        self.limits = limits
        self._allowed, self._stay_secure = tuple(allowed), stay_secure
        self._ssl_context = ssl_context or httpx2.create_ssl_context()
        self._resolve = resolve
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = defaultdict(
            lambda: _Host(threading.Semaphore(limits.per_host))
        )

    def fetch(
        self, url: str, headers: Mapping[str, str] | None = None, *, retried: Retried = _ignore
    ) -> Reply:
        """The body of ``url``. FetchError if the last try fails; the failures that another try
        followed are told to ``retried``."""
        wanted = 206 if headers and "Range" in headers else 200

        def once(clock: _Clock) -> Reply:
            with self._open(url, headers or {}, clock) as (response, final):
                _expect(response, {wanted})
                return Reply(self._body(response, clock), final)

        return self._tried(url, once, retried)

    def save(
        self,
        url: str,
        partial: Path,
        *,
        retried: Retried = _ignore,
        progress: Callable[[int, int | None], None] = _ignore,
    ) -> None:
        """Writes the body of ``url`` to ``partial``, going on behind what is there already if the
        server vouches that it still has the same file (If-Range). ``progress`` is told the bytes
        there and the bytes expected. FetchError as in ``fetch``; what was received is kept."""
        validator = partial.with_name(f"{partial.name}.validator")
        partial.parent.mkdir(parents=True, exist_ok=True)

        def once(clock: _Clock) -> None:
            mark = validator.read_text() if validator.exists() else ""
            have = partial.stat().st_size if mark and partial.exists() else 0
            headers = {"Range": f"bytes={have}-", "If-Range": mark} if have else {}
            with self._open(url, headers, clock) as (response, _):
                span = _header(response, "content-range")
                if have and response.status == 416:
                    if span == f"bytes */{have}":
                        return  # all of it is there
                    validator.unlink()
                    raise FetchError("http_416", "the file has changed", passing=True)
                _expect(response, {200, 206} if have else {200})
                if _header(response, "content-encoding") not in ("", "identity"):
                    raise FetchError("bad_encoding", "compressed, though not asked for")
                if response.status == 200:
                    have, length = 0, _header(response, "content-length")
                    total = int(length) if length.isdigit() else None
                elif part := re.fullmatch(rf"bytes {have}-\d+/(\d{{1,18}})", span):
                    total = int(part[1])
                else:
                    validator.unlink()  # the next try begins anew
                    detail = f"asked for bytes from {have}, got '{span}'"
                    raise FetchError("broken", detail, passing=True)
                with partial.open("ab" if have else "wb") as file:
                    if not have:  # not earlier: the old mark belongs to the bytes just cut off
                        validator.write_text(_mark(response))
                    for chunk in self._raw(response, clock, have):
                        file.write(chunk)
                        have += len(chunk)
                        progress(have, total)
                if total is not None and have != total:  # a server may send less than it was asked
                    detail = f"{have:,} of {total:,} bytes are there"
                    raise FetchError("broken", detail, passing=True)

        self._tried(url, once, retried)
        validator.unlink(missing_ok=True)

    def _tried(self, url: str, once: Callable[[_Clock], T], retried: Retried) -> T:
        limits = self.limits

        def attempt() -> T:
            clock = _Clock(time.monotonic() + limits.seconds)
            try:
                return once(clock)
            except FetchError as error:
                error.url, error.received = url, clock.received
                raise

        def again(error: BaseException) -> bool:
            return (
                isinstance(error, FetchError)
                and error.passing
                and error.retry_after <= limits.longest_wait
            )

        def tell(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, FetchError):
                retried(error)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(again),
            stop=tenacity.stop_after_attempt(limits.tries),
            wait=tenacity.wait_exponential(limits.back_off, max=limits.longest_wait),
            before_sleep=tell,
            reraise=True,
        )(attempt)

    @contextlib.contextmanager
    def _open(
        self, address: str, headers: Mapping[str, str], clock: _Clock
    ) -> Iterator[tuple[httpcore2.Response, str]]:
        """The first response that is no redirect, open for reading, and its URL."""
        limits = self.limits
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), limits.silence)
        url = _parsed(address)
        for _ in range(limits.redirects + 1):
            with (
                self._turn(url, clock) as host,
                _errors_named(host),
                httpcore2.ConnectionPool(
                    ssl_context=self._ssl_context,
                    network_backend=_CheckedBackend(self._checked_addresses, clock),
                ) as pool,
                pool.stream(
                    "GET",
                    httpcore2.URL(
                        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
                    ),
                    headers=[
                        ("Host", url.netloc.decode("ascii")),
                        ("User-Agent", AGENT),
                        ("Accept", "*/*"),
                        ("Accept-Encoding", "identity"),
                        ("Connection", "close"),
                        *headers.items(),
                    ],
                    extensions={"timeout": timeout},
                ) as response,
            ):
                location = _header(response, "location")
                if response.status not in REDIRECTS or not location:
                    self._heed(response, host)
                    yield response, str(url)
                    return
                host.failures = 0
            secure, url = url.scheme == "https", _parsed(location, base=url)
            if secure and url.scheme == "http" and self._stay_secure:
                raise FetchError("tls", f"redirects from https to {str(url)[:200]}")
        raise FetchError("redirects", f"more than {limits.redirects} redirects")

    @contextlib.contextmanager
    def _turn(self, url: httpx2.URL, clock: _Clock) -> Iterator[_Host]:
        """Waits for the host's turn; the wait is not taken from the clock."""
        with self._lock:
            host = self._hosts[url.netloc.decode("ascii")]
        asked = time.monotonic()
        with host.slots:
            with host.lock:
                now = time.monotonic()
                if host.failures >= self.limits.host_failures:
                    detail = f"{host.failures} failures in a row; left alone for this run"
                    raise FetchError("host_down", detail, passing=True, retry_after=float("inf"))
                asked_for = host.left_alone_until - now
                if asked_for > self.limits.longest_wait:
                    detail = f"asks to be left alone for {asked_for:.0f} s"
                    raise FetchError("host_busy", detail, passing=True, retry_after=asked_for)
                start = max(now, host.free_at, host.left_alone_until)
                host.free_at = start + self.limits.pause
            time.sleep(start - now)
            clock.deadline += time.monotonic() - asked
            yield host

    def _heed(self, response: httpcore2.Response, host: _Host) -> None:
        """Notes that the host answers, and until when it wants to be left alone."""
        host.failures = 0
        if response.status in PASSING:
            with host.lock:
                until = time.monotonic() + _retry_after(response)
                host.left_alone_until = max(host.left_alone_until, until)

    def _checked_addresses(self, host: str, port: int) -> list[str]:
        try:
            addresses = self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise FetchError("unreachable", f"{host}: {error}", passing=True) from None
        for address in addresses:
            ip = ipaddress.ip_address(address.partition("%")[0])
            if not is_public(address) and not any(ip in network for network in self._allowed):
                raise FetchError("blocked_address", f"{host} is {address}, which is not public")
        return addresses

    def _raw(self, response: httpcore2.Response, clock: _Clock, have: int = 0) -> Iterator[bytes]:
        """The body as it comes, at most ``max_bytes`` behind the ``have`` that are there."""
        most = self.limits.max_bytes
        length = _header(response, "content-length")
        if length.isdigit() and have + int(length) > most:
            raise FetchError("too_large", f"announces {int(length):,} bytes, {most:,} are allowed")
        for chunk in response.iter_stream():
            clock.received += len(chunk)
            if have + clock.received > most:
                raise FetchError("too_large", f"sends more than {most:,} bytes")
            yield chunk

    def _body(self, response: httpcore2.Response, clock: _Clock) -> bytes:
        coding = _header(response, "content-encoding").lower()
        chunks = self._raw(response, clock)
        if coding in ("", "identity"):
            return b"".join(chunks)
        if coding in ("gzip", "x-gzip", "deflate"):
            return bounded_inflate(chunks, self.limits.max_bytes)
        raise FetchError("bad_encoding", f"Content-Encoding '{coding}' was not asked for")


@contextlib.contextmanager
def _errors_named(host: _Host) -> Iterator[None]:
    """Turns what the connection raises into FetchError."""
    try:
        yield
    except httpcore2.TimeoutException as error:
        host.failures += 1
        raise FetchError("timeout", str(error) or "no answer in time", passing=True) from None
    except httpcore2.ConnectError as error:
        if any(isinstance(reason, ssl.SSLError) for reason in error.args):
            raise FetchError("tls", str(error)) from None
        host.failures += 1
        raise FetchError("unreachable", str(error), passing=True) from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        raise FetchError("broken", str(error) or "connection lost", passing=True) from None


def _parsed(address: str, base: httpx2.URL | None = None) -> httpx2.URL:
    """An absolute http or https URL, or FetchError bad_url."""
    try:
        url = base.join(address) if base else httpx2.URL(address)
    except (httpx2.InvalidURL, ValueError) as error:
        raise FetchError("bad_url", str(error)) from None
    # Not ``host``: it decodes international names and refuses some that are in use (a_b.xn--p1ai).
    if url.scheme not in ("http", "https") or not url.raw_host:
        raise FetchError("bad_url", f"'{str(url)[:200]}' is not an http or https address")
    if url.port is not None and not 0 < url.port < 65536:
        raise FetchError("bad_url", f"'{str(url)[:200]}': ports are 1 to 65535")
    return url


def _header(response: httpcore2.Response, name: str) -> str:
    """The first header of that name, "" if there is none."""
    wanted = name.encode()
    return next(
        (value.decode("latin-1") for key, value in response.headers if key.lower() == wanted), ""
    )


def _mark(response: httpcore2.Response) -> str:
    """What If-Range may say of this version of a file: its strong ETag, or else its date; "" if
    there is neither. What is not ASCII cannot be said in a request."""
    marks = (_header(response, name) for name in ("etag", "last-modified"))
    return next((mark for mark in marks if mark and mark.isascii() and mark[:2] != "W/"), "")


def _expect(response: httpcore2.Response, statuses: set[int]) -> None:
    if response.status not in statuses:
        raise FetchError(
            f"http_{response.status}",
            f"HTTP status {response.status}",
            passing=response.status in PASSING,
            retry_after=_retry_after(response),
        )


def _retry_after(response: httpcore2.Response) -> float:
    """Seconds that Retry-After asks for (a number or a date), 0 if it does not."""
    text = _header(response, "retry-after").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
        return max(0.0, moment.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
