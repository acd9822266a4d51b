"""Servers on loopback that behave badly, each in its own way, and pictures for them to send.

A server is ``serving(behaviour)``: a plain socket, one thread a connection, and the behaviour, a
function of the ``Talk`` with one client. Public: ``serving``, ``Server``, ``Talk``, ``picture``,
``response``, the behaviours, ``certificate``.
"""

import contextlib
import gzip
import ssl
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from socket import create_server, socket

import numpy as np
from PIL import Image

# A self-signed certificate for 127.0.0.1, made for these tests; nothing else trusts it.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXNPZFB/bvPDWuiHZ
go/9pWwyo+2DEQ01njDxaIkHJNyhRANCAAQkAD/dFWSwJG4NRu1GvZEI3As4EEAc
2wF4Kormx/kiUKyxyOVlG361L7P86HH571AVs8Yl5bqQaKfWVNhhwI+q
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBZTCCAQqgAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1sb29wYmFj
ayB0ZXN0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1sb29wYmFjayB0ZXN0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEJAA/
3RVksCRuDUbtRr2RCNwLOBBAHNsBeCqK5sf5IlCsscjlZRt+tS+z/Ohx+e9QFbPG
JeW6kGin1lTYYcCPqqNDMEEwDwYDVR0RBAgwBocEfwAAATAPBgNVHRMBAf8EBTAD
AQH/MB0GA1UdDgQWBBRfOjmbZpDtx+SNecnfG0IeCeQzzjAKBggqhkjOPQQDAgNJ
ADBGAiEA8z1/fXPpTxvLcYdwgAVosiQM2rW/GcyhjqhyFm1fdkMCIQDvrhz4kIHl
AkMAZCaSqyHOFVM2DQ26qT2lit/zPpIs2A==
-----END CERTIFICATE-----
"""


def certificate(folder: Path) -> Path:
    """The certificate with its key, as a file."""
    path = folder / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


class Talk:
    """One request and what is said to its client."""

    def __init__(self, client: socket, server: "Server", head: str) -> None:
        self._client, self.server = client, server
        first, _, rest = head.partition("\r\n")
        self.path = first.split()[1]
        self.headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in rest.splitlines())
        }
        with server.lock:
            server.hits[self.path] += 1
            self.hit = server.hits[self.path]  # 1 for the first request of this path

    def say(self, data: bytes) -> None:
        self._client.sendall(data)

    def wait(self, seconds: float) -> bool:
        """Waits; True if the test is over."""
        return self.server.over.wait(seconds)


class Server:
    """Where it listens, and how often each path was asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.hits: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.over = threading.Event()


Behaviour = Callable[[Talk], None]


@contextlib.contextmanager
def serving(
    behaviour: Behaviour, *, address: str = "127.0.0.1", pem: Path | None = None
) -> Iterator[Server]:
    """Runs a server on a free port of a loopback address, with TLS if there is a certificate."""
    listener = create_server((address, 0), backlog=64)
    listener.settimeout(0.05)
    scheme = "https" if pem else "http"
    server = Server(f"{scheme}://{address}:{listener.getsockname()[1]}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if pem:
        context.load_cert_chain(pem)

    def talk(client: socket) -> None:
        with contextlib.suppress(OSError), client:  # clients hang up on bad servers
            client.settimeout(5)
            if pem:
                client = context.wrap_socket(client, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(65536)
                if not data:
                    return
                head += data
            behaviour(Talk(client, server, head.decode("latin-1")))

    def accept() -> None:
        while not server.over.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = listener.accept()
                threading.Thread(target=talk, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        thread.join()
        listener.close()


def response(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    """A whole and honest HTTP response; a header given replaces the honest one."""
    fields = {"Content-Length": len(body), "Content-Type": "image/jpeg"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def picture(seed: int, *, size: int = 96, quality: int = 90, kind: str = "JPEG") -> bytes:
    """A picture of its own for each seed; of one seed, the same motif at any size and quality."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, kind, quality=quality)
    return file.getvalue()


def compressed_zeros(size: int, wbits: int) -> bytes:
    """``size`` zero bytes, compressed without ever being held."""
    packer, block = zlib.compressobj(level=1, wbits=wbits), bytes(2**20)
    blocks = [packer.compress(block) for _ in range(size // len(block))]
    return b"".join([*blocks, packer.compress(bytes(size % len(block))), packer.flush()])


def black_png(side: int) -> bytes:
    """A square of one bit a pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = compressed_zeros(side * (1 + (side + 7) // 8), wbits=15)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


GOOD = picture(1)
ZIP_BOMB = compressed_zeros(64 * 2**20, wbits=31)
HUGE_PNG = black_png(30_000)


def honest(talk: Talk) -> None:
    talk.say(response(GOOD))


def hangs(talk: Talk) -> None:
    talk.wait(30)


def drips_body(talk: Talk) -> None:
    talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while not talk.wait(1.0):
        talk.say(b"x")


def drips_headers(talk: Talk) -> None:
    talk.say(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not talk.wait(0.1):
        talk.say(b"x")


def hangs_up(talk: Talk) -> None:
    pass


def speaks_nonsense(talk: Talk) -> None:
    talk.say(b"220 mail.example ESMTP\r\n" * 3)


def endless_headers(talk: Talk) -> None:
    talk.say(b"HTTP/1.1 200 OK\r\n")
    while not talk.server.over.is_set():
        talk.say(b"X-More: " + b"x" * 1000 + b"\r\n")


def announces_more(talk: Talk) -> None:
    talk.say(response(GOOD, Content_Length=10 * len(GOOD)))


def announces_less(talk: Talk) -> None:
    talk.say(response(GOOD, Content_Length=len(GOOD) // 2))


def announces_terabytes(talk: Talk) -> None:
    talk.say(response(GOOD, Content_Length=10**13))


def endless_body(talk: Talk) -> None:
    talk.say(b"HTTP/1.1 200 OK\r\n\r\n")
    while not talk.server.over.is_set():
        talk.say(b"\xff\xd8\xff\xe0" * 4096)


def cut_off(talk: Talk) -> None:
    talk.say(response(GOOD[: len(GOOD) // 2], Content_Length=None))


def redirects_forever(talk: Talk) -> None:
    talk.say(response(b"", "302 Found", Location=f"{talk.path}x"))


def redirects_to(location: str) -> Behaviour:
    return lambda talk: talk.say(response(b"", "301 Moved Permanently", Location=location))


def html(talk: Talk) -> None:
    talk.say(response(b"<!DOCTYPE html><title>Not here any more</title>"))


def svg(talk: Talk) -> None:
    talk.say(response(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'))


def zipped(talk: Talk) -> None:
    talk.say(response(gzip.compress(GOOD), Content_Encoding="gzip"))


def zip_bomb(talk: Talk) -> None:
    talk.say(response(ZIP_BOMB, Content_Encoding="gzip"))


def unknown_coding(talk: Talk) -> None:
    talk.say(response(GOOD, Content_Encoding="br"))


def huge_png(talk: Talk) -> None:
    talk.say(response(HUGE_PNG))


def one_pixel(talk: Talk) -> None:
    talk.say(response(picture(1, size=1, kind="PNG")))


def one_colour(talk: Talk) -> None:
    file = BytesIO()
    Image.new("RGB", (200, 200), (240, 240, 240)).save(file, "JPEG")
    talk.say(response(file.getvalue()))


def status(line: str, *, times: int, **headers: object) -> Behaviour:
    """Answers with a status a number of times, then well."""

    def behaviour(talk: Talk) -> None:
        bad = talk.hit <= times
        talk.say(response(b"", line, **headers) if bad else response(GOOD))

    return behaviour
