"""The page, served to this machine alone.

A small starlette application: the built page from a table of files read at the start, and scenes as they are asked for.
Torch, and the model, are loaded in a thread when the page first asks, so the page itself never waits for them.

Only requests that name this server as their host are answered, and none that come from another site's page.
"""

from __future__ import annotations

import asyncio
import json
import mimetypes
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from palimpsest import __version__
from palimpsest.explainer.code import code

if TYPE_CHECKING:
    from palimpsest.explainer.scenes import Watched

STATIC = Path(__file__).parent / "static"
HOST = "127.0.0.1"
MAX_BODY = 32 << 10  # bytes; the longest sentence needs 2 kB
MAX_CONNECTIONS = 128  # a browser opens six
PATIENCE = 10.0  # seconds for a request to arrive
EXAMPLES = (
    "The door is red. Now the door is blue. What colour is the door?",
    "The door is red. The lamp is green. Now the door is blue. What colour is the lamp?",
    "Ada is in the garden. Then Ada is in the attic. Where is Ada?",
)
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self' data:; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class Library:
    """The scenes and the model behind the page, loaded once, in a thread, when first asked for."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._lock, self._loaded = threading.Lock(), None

    def get(self) -> tuple[Any, Watched]:
        """The module of scenes and the model; waits for them.

        Raises:
            ValueError: the checkpoint cannot be used.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = Future()
                threading.Thread(target=self._load, args=(self._loaded,), daemon=True, name="palimpsest").start()
        return self._loaded.result()

    def _load(self, loaded: Future) -> None:
        try:
            from palimpsest.explainer import scenes

            loaded.set_result((scenes, scenes.Watched(self.folder or scenes.SHIPPED)))
        except Exception as error:  # whoever asked hears it
            loaded.set_exception(error)

    def about(self) -> dict:
        scenes, model = self.get()
        return {
            "version": __version__,
            "model": model.describe(),
            "worked": {name: example.title for name, example in scenes.WORKED.items()},
            "stories": scenes.STORIES,
            "examples": list(EXAMPLES),
        }

    def scene(self, name: str, body: bytes) -> bytes:
        """A scene as safetensors.

        Args:
            name: of palimpsest.explainer.scenes.SCENES.
            body: a JSON object of its arguments.

        Raises:
            ValueError: there is no such scene, or it does not take these arguments.
        """
        from palimpsest.explainer.scene_file import to_safetensors

        scenes, model = self.get()
        if name not in scenes.SCENES:
            raise ValueError(f"There is no scene {name[:80]!r}; the scenes are {', '.join(scenes.SCENES)}.")
        compute = scenes.SCENES[name]
        given = arguments_of(compute, body)
        return to_safetensors(compute(model, **given) if "model" in signature(compute).parameters else compute(**given))


def arguments_of(function: Callable, body: bytes) -> dict[str, Any]:
    """What JSON gives a function to be called with, of the types in its signature; `model` is not asked for.

    Raises:
        ValueError: the body is no JSON object, lacks an argument, has one too many, or one of another type.

    >>> def double(x: int): ...
    >>> arguments_of(double, b'{"x": 2}')
    {'x': 2}
    """
    from pydantic import ConfigDict, ValidationError, create_model

    types: dict[str, Any] = {
        name: kind for name, kind in get_type_hints(function).items() if name not in ("model", "return")
    }
    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    defaults = {name: parameter.default for name, parameter in signature(function).parameters.items()}
    fields: dict[str, Any] = {
        name: (kind, ... if defaults[name] is Parameter.empty else defaults[name]) for name, kind in types.items()
    }
    expected = create_model("arguments", __config__=strict, **fields)
    try:
        return dict(expected.model_validate_json(body))
    except ValidationError as error:
        first = error.errors()[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"]
        given = "" if first["type"] in ("missing", "json_invalid") else f", which is {str(first['input'])[:40]!r}"
        takes = ", ".join(types) or "none"
        raise ValueError(f"{where or 'The request'}{given}: {what}. The arguments are {takes}.") from None


def build_app(library: Library, port: int):
    """The ASGI application for this port."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    files = {str(path.relative_to(STATIC)): path.read_bytes() for path in sorted(STATIC.rglob("*")) if path.is_file()}

    async def answer(compute: Callable[[], Response]) -> Response:
        try:
            return await run_in_threadpool(compute)
        except (ValueError, OSError, ImportError) as error:  # what the reader can change, said in a sentence
            return JSONResponse({"error": str(error)}, status_code=400)

    async def page(request: Request) -> Response:
        name = request.path_params["path"] or "index.html"
        if name not in files:
            return JSONResponse(
                {"error": f"There is no page {name[:80]!r} here; the explainer is at /."}, status_code=404
            )
        return Response(files[name], media_type=mimetypes.guess_type(name)[0] or "application/octet-stream")

    async def about(request: Request) -> Response:
        return await answer(lambda: JSONResponse(library.about()))

    async def show_code(request: Request) -> Response:
        return await answer(lambda: JSONResponse(code()))

    async def scene(request: Request) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return JSONResponse({"error": "The request's content-type is not application/json."}, status_code=415)
        name, body = request.path_params["name"], await request.body()
        return await answer(lambda: Response(library.scene(name, body), media_type="application/octet-stream"))

    return Starlette(
        routes=[
            Route("/api/about", about),
            Route("/api/code", show_code),
            Route("/api/scene/{name}", scene, methods=["POST"]),
            Route("/{path:path}", page),
        ],
        middleware=[
            Middleware(Guard, port=port),
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False),
        ],
    )


class Guard:
    """Adds the headers, and refuses pages of other sites and bodies that are too large or too slow, before any is read."""

    def __init__(self, app, port: int):
        self.app, self.origins = app, {f"http://{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        origin, length = headers.get(b"origin"), headers.get(b"content-length", b"0")
        if origin is not None and origin.decode("latin-1") not in self.origins:
            return await _say(send, 403, "This server does not answer pages of other sites.")
        if not length.isdigit() or int(length) > MAX_BODY:
            return await _say(send, *TOO_LARGE)
        try:
            async with asyncio.timeout(PATIENCE):
                body = await _body(receive)
        except TimeoutError:
            return await _say(send, 408, f"The request did not arrive within {PATIENCE:g} seconds; send it at once.")
        if body is None:
            return
        if len(body) > MAX_BODY:
            return await _say(send, *TOO_LARGE)
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def read():
            return given.pop() if given else await receive()

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        await self.app(scope, read, with_headers)


TOO_LARGE = (413, f"The request is larger than {MAX_BODY} bytes; send less.")


async def _body(receive) -> bytes | None:
    """The body, or as much of it as tells that it is too large; None if whoever sent it has gone."""
    body, more = b"", True
    while more and len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _say(send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def listen(port: int = 0) -> socket.socket:
    """A socket on this machine alone; port 0 takes a free one.

    Raises:
        ValueError: the port is taken, or cannot be used.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; expected 0 to 65535, where 0 takes a free one")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"port {port} cannot be used ({error.strerror}); leave --port out to take a free one"
        ) from error
    return listener


def serve(listener: socket.socket, library: Library, ready: Callable[[str], None] = lambda url: None) -> None:
    """Answers on a socket from `listen` until interrupted; calls ready with the page's address once it can."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        """One that closes if the head of a request is not there in time: uvicorn waits for the first one for ever."""

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self.clock = self.loop.call_later(PATIENCE, self.transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self.clock.cancel()
            elif self.clock.cancelled():  # the next head on this line has begun
                self.clock = self.loop.call_later(PATIENCE, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self.clock.cancel()
            super().connection_lost(exc)

    port = listener.getsockname()[1]
    config = uvicorn.Config(
        build_app(library, port),
        **{"http": Connection, "limit_concurrency": MAX_CONNECTIONS},  # type: ignore[arg-type]
        **{"ws": "none", "lifespan": "off", "loop": "asyncio"},  # type: ignore[arg-type]
        **{"log_level": "error", "access_log": False, "server_header": False, "timeout_graceful_shutdown": 1},  # type: ignore[arg-type]
    )
    url = f"http://{HOST}:{port}/"

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            ready(url)

    Server(config).run(sockets=[listener])
