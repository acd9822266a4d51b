"""The page of ``app.py`` and the addresses that it talks to.

A visitor's findings are behind a secret name that the page is given when it is opened. Requests
that change something must be JSON, which a page of another origin cannot send here without being
asked first, and must name this host, so that no other name can be made to point here (but for a
page that listens on every address, whose names are not known).
Public: ``make_app``, ``listening_socket``, ``hosts_of``, ``is_open``.
"""

import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.app_session import Bench, Session, Visitors, result_table
from utils.errors import InputError
from utils.neuron_sets import size

if TYPE_CHECKING:
    from starlette.requests import Request

PAGE = Path(__file__).resolve().parent
FILES = {
    "/": ("app_page.html", "text/html"),
    "/style.css": ("app_style.css", "text/css"),
    "/script.js": ("app_script.js", "text/javascript"),
}
LARGEST_REQUEST = 64_000  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def listening_socket(host: str, port: int) -> socket.socket:
    """Taken before the model is loaded; whoever connects meanwhile waits. ``host``: a name or an
    IPv4 address. InputError if that cannot be done."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except (OSError, TypeError, UnicodeError) as error:  # the last two of names that are none
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--host {host} --port {port}: cannot listen there ({reason}); choose another"
        ) from None
    return bound


def _address(bound: socket.socket) -> ipaddress.IPv4Address:
    """Where it really listens: names of an address, and short forms as 0, are many."""
    return ipaddress.IPv4Address(bound.getsockname()[0])


def hosts_of(bound: socket.socket, host: str) -> list[str]:
    """Names under which the page may be asked; any ("*") where it listens on every address."""
    address = _address(bound)
    return ["*"] if address.is_unspecified else [host, str(address), "127.0.0.1", "localhost"]


def is_open(bound: socket.socket) -> bool:
    """Whether other machines may reach it."""
    return not _address(bound).is_loopback


def make_app(bench: Bench, *, model: str, examples: Sequence[str], hosts: Sequence[str]) -> Any:
    """The application. ``model``: what the page calls it; ``hosts``: names under which it may be
    asked ("*": any)."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    visitors = Visitors(bench)

    def refused(sentence: str, status: int = 400) -> JSONResponse:
        return JSONResponse({"error": sentence}, status_code=status, headers=HEADERS)

    def session_of(request: "Request") -> Session:
        session = visitors.find(request.path_params["name"])
        if session is None:
            raise HTTPException(404, "This session is over: open the page anew.")
        return session

    async def body(request: "Request") -> dict[str, Any]:
        """The JSON object of a request; InputError for anything else."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise InputError("Requests must be JSON.")
        data = b""
        async for chunk in request.stream():
            # Read to its end, so that the sender hears the answer, but not kept.
            data += chunk[: LARGEST_REQUEST + 1 - len(data)]
        if len(data) > LARGEST_REQUEST:
            raise InputError(f"A request may have {LARGEST_REQUEST} bytes.")
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise InputError("The request is not valid JSON.") from None
        if not isinstance(content, dict):
            raise InputError("The request is not a JSON object.")
        return content

    def file(name: str, kind: str) -> Callable[["Request"], Awaitable[Response]]:
        text = (PAGE / name).read_text(encoding="utf-8")

        async def send(request: "Request") -> Response:
            return Response(text, media_type=kind, headers=HEADERS)

        return send

    async def enter(request: "Request") -> Response:
        await body(request)
        found = {"name": visitors.enter(), "model": model, "examples": list(examples)}
        return JSONResponse(found, headers=HEADERS)

    async def ask(request: "Request") -> Response:
        session, wanted = session_of(request), await body(request)
        what = request.path_params["what"]
        if what == "score":
            session.ask_score(wanted.get("caption"))
        elif what == "neurons":
            session.ask_neurons(wanted.get("caption"))
        elif what == "pictures":
            session.ask_pictures(
                wanted.get("caption"),
                wanted.get("factor"),
                wanted.get("samples"),
                wanted.get("seed"),
            )
        elif what == "edit":
            session.ask_edit(wanted.get("factor"))
        elif what == "cancel":
            session.cancel()
        else:
            raise HTTPException(404, "There is nothing here.")
        return JSONResponse(state_of(bench, session), headers=HEADERS)

    async def state(request: "Request") -> Response:
        return JSONResponse(state_of(bench, session_of(request)), headers=HEADERS)

    async def picture(request: "Request") -> Response:
        pictures = session_of(request).pictures
        kind, number = request.path_params["kind"], request.path_params["number"]
        row: tuple[bytes, ...] = ()
        if pictures is not None and kind in ("unblocked", "blocked"):
            row = getattr(pictures, kind)
        if number >= len(row):
            raise HTTPException(404, "There is no such picture.")
        return Response(row[number], media_type="image/png", headers=HEADERS)

    async def table(request: "Request") -> Response:
        text = result_table(session_of(request).known_neurons())
        return download(text.encode(), "located_neurons.csv", "text/csv")

    async def edit(request: "Request") -> Response:
        exported = session_of(request).edit
        if exported is None:
            raise HTTPException(404, "Nothing has been exported yet.")
        return download(exported.data, "edit.safetensors", "application/octet-stream")

    def download(data: bytes, name: str, kind: str) -> Response:
        disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(data, media_type=kind, headers={**HEADERS, **disposition})

    async def on_input_error(request: "Request", error: Exception) -> Response:
        return refused(str(error))

    async def on_http_error(request: "Request", error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refused(error.detail, error.status_code)

    here = "/api/{name}"
    return Starlette(
        routes=[
            *(Route(path, file(*what)) for path, what in FILES.items()),
            Route("/api", enter, methods=["POST"]),
            Route(here, state),
            Route(here + "/located_neurons.csv", table),
            Route(here + "/edit.safetensors", edit),
            Route(here + "/{kind}/{number:int}.png", picture),
            Route(here + "/{what}", ask, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={InputError: on_input_error, HTTPException: on_http_error},
    )


def state_of(bench: Bench, session: Session) -> dict[str, Any]:
    """All that the page shows of a session."""
    score, located, pictures = session.score, session.located, session.pictures
    edit, job = session.edit, session.job
    return {
        "model": {"state": bench.state, "sentence": bench.sentence},
        "job": None
        if job is None
        else {
            "state": job.state,
            "stage": job.stage,
            "done": job.done,
            "total": job.total,
            "ahead": session.ahead() if job.state == "waiting" else 0,
            "sentence": job.sentence,
        },
        "score": None
        if score is None
        else {
            "caption": score.caption,
            "value": score.value,
            "threshold": score.threshold,
            "memorized": score.memorized,
            "note": score.note,
        },
        "located": None
        if located is None
        else {
            "caption": located.score.caption,
            "candidates": size(located.initial),
            "neurons": located.refined,
            "count": size(located.refined),
            "score": located.refined_score,
            "evaluations": located.evaluations,
        },
        "pictures": None
        if pictures is None
        else {
            "caption": pictures.caption,
            "factor": pictures.factor,
            "unblocked": len(pictures.unblocked),
            "blocked": len(pictures.blocked),
            "lost": pictures.lost,
        },
        "edit": None if edit is None else {"factor": edit.factor},
    }
