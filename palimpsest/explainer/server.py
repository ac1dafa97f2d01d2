"""The page, served to this machine alone.

A small starlette application: the built page from a table of files read at the start, and scenes as they are asked for.
Torch, and the model, are loaded in a thread when the page first asks, so the page itself never waits for them.

Only requests that name this server as their host are answered, and none that come from another site's page.
"""

from __future__ import annotations

import json
import mimetypes
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest import __version__
from palimpsest.explainer.code import code

if TYPE_CHECKING:
    from palimpsest.explainer.scenes import Watched

STATIC = Path(__file__).parent / "static"
HOST = "127.0.0.1"
MAX_BODY = 32 << 10  # bytes; the longest sentence needs 2 kB
EXAMPLES = (
    "The door is red. Now the door is blue. What colour is the door?",
    "Ada is in the garden. Then Ada is in the attic. Where is Ada?",
    "Return the number of items in the list.",
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
ARGUMENTS: dict[str, dict[str, type | tuple]] = {  # scene -> its arguments and their types
    "worked": {"name": str},
    "sentence": {"text": str, "layer": int, "head": int},
    "heads": {"text": str},
    "touch": {"alpha": (2,), "beta": float, "angle": float, "value": (2,), "times": int, "eraser": bool},
    "family": {"story": str, "beta": float, "keep": (2,)},
    "chunk": {"text": str, "layer": int, "head": int, "start": int, "size": int},
    "hybrid": {},
    "order": {"text": str},
}


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

    def scene(self, name: str, arguments: dict) -> bytes:
        from palimpsest.explainer.scene_file import to_safetensors

        scenes, model = self.get()
        of_model = {
            "sentence": scenes.sentence,
            "heads": scenes.heads,
            "chunk": scenes.chunk_of_sentence,
            "order": scenes.order,
        }
        if name in of_model:
            return to_safetensors(of_model[name](model, **arguments))
        return to_safetensors(getattr(scenes, name)(**arguments))


def checked(name: str, given: Any) -> dict:
    """The arguments of a scene, or a ValueError that says what is wrong with them."""
    if name not in ARGUMENTS:
        raise ValueError(f"There is no scene {name!r}; the scenes are {', '.join(ARGUMENTS)}.")
    if not isinstance(given, dict):
        raise ValueError(f"The request holds {type(given).__name__}; expected a JSON object of arguments.")
    expected = ARGUMENTS[name]
    for argument in given:
        if argument not in expected:
            raise ValueError(f"{name} has no argument {argument!r}; it takes {', '.join(expected) or 'none'}.")
    for argument, kind in expected.items():
        if argument not in given:
            raise ValueError(f"{name} needs {argument}; it takes {', '.join(expected)}.")
        if not _is(given[argument], kind):
            what = f"a list of {kind[0]} numbers" if isinstance(kind, tuple) else kind.__name__
            raise ValueError(f"{argument} is {str(given[argument])[:40]!r}; expected {what}.")
    return given


def _is(value: Any, kind: type | tuple) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, list) and len(value) == kind[0] and all(_is(x, float) for x in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def build_app(library: Library, port: int):
    """The ASGI application for this port."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
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
        body = await request.body()

        def compute() -> Response:
            try:
                given = json.loads(body)
            except (ValueError, RecursionError):
                raise ValueError("The request is not JSON; send an object with the scene's arguments.") from None
            name = request.path_params["name"]
            return Response(library.scene(name, checked(name, given)), media_type="application/octet-stream")

        return await answer(compute)

    app = Starlette(
        routes=[
            Route("/api/about", about),
            Route("/api/code", show_code),
            Route("/api/scene/{name}", scene, methods=["POST"]),
            Route("/{path:path}", page),
        ]
    )
    return Guard(app, port)


class Guard:
    """Lets only this machine's own page through: host, origin and size are checked before anything is read."""

    def __init__(self, app, port: int):
        self.app = app
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            return await _say(send, *refusal)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
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

    def _refusal(self, scope) -> tuple[int, str] | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        hosts = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return 403, "This server answers only to its own address; open the one that palimpsest explain printed."
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1") not in self.origins:
            return 403, "This server does not answer pages of other sites."
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return TOO_LARGE
        return None


TOO_LARGE = (413, f"The request is larger than {MAX_BODY} bytes; send less.")


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

    port = listener.getsockname()[1]
    config = uvicorn.Config(
        build_app(library, port),
        **{"http": "h11", "ws": "none", "lifespan": "off", "loop": "asyncio"},  # type: ignore[arg-type]
        **{"log_level": "error", "access_log": False, "server_header": False, "timeout_graceful_shutdown": 1},  # type: ignore[arg-type]
    )
    url = f"http://{HOST}:{port}/"

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            ready(url)

    Server(config).run(sockets=[listener])
