"""Hostile requests to the explainer's server: what is no HTTP, what is no JSON, arguments of every wrong kind, and silence."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import socket
import threading
from collections.abc import Iterable, Iterator
from inspect import signature
from pathlib import Path

from benchmarks.faults import Campaign, Trial
from palimpsest.explainer import server
from palimpsest.explainer.server import HOST, MAX_BODY, STATIC, Library, listen, serve

GOOD = {
    "worked": {"name": "walk"},
    "sentence": {"text": "The door is red.", "layer": 0, "head": 0},
    "heads": {"text": "The door is red."},
    "touch": {"alpha": [1, 0.5], "beta": 1, "angle": 30, "value": [1, 1], "times": 2, "eraser": True},
    "family": {"story": "twice", "beta": 1, "keep": [0.5, 1], "positions": False},
    "chunk": {"text": "The door is red. Now it is blue.", "layer": 0, "head": 0, "start": 0, "size": 8},
    "hybrid": {},
    "answers": {"text": "The door is red. What colour is the door?"},
    "order": {"text": "The door is red. Now it is blue."},
}
JSON = {"Content-Type": "application/json"}
LONG = '"' + "a" * 5000 + '"'
NUMBERS = ("1e400", "-1e400", "NaN", "Infinity", "1e308", "-5", '"1"', "null", "true", "[]", "{}", "[[1]]", LONG)
TEXTS = ("1", "null", "true", "[]", '["a"]', "{}", '""', LONG, '"\\ud800"')
PAIRS = (
    "1",
    "[]",
    "[1]",
    "[1, 1, 1]",
    '["a", "b"]',
    "[null, 1]",
    "[1e400, 1]",
    "[NaN, 1]",
    "[-7, 1]",
    "[true, false]",
    "{}",
)
FLAGS = ("0", "1", '"true"', "null", "[]", "{}")
WRONG = {  # argument -> JSON values that it must not take
    **dict.fromkeys(("text", "name", "story"), TEXTS),
    **dict.fromkeys(("alpha", "value", "keep"), PAIRS),
    **dict.fromkeys(("layer", "head", "times", "start", "size"), (*NUMBERS, "0.5", "99999999999999999999", "-1")),
    **dict.fromkeys(("beta", "angle"), NUMBERS),
    **dict.fromkeys(("eraser", "positions"), FLAGS),
}
BODIES = (
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 20_000, b'{"a":' * 5_000, b"\0" * 1000, b"{}{}", b"NaN",
    b'{"name": "walk", "name": 1}', b'{"name": "walk", "more": 1}', b'{"__proto__": {}}', b"x" * (MAX_BODY + 1),
)  # fmt: skip
PATHS = (
    "/../server.py", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fserver.py", "//etc/passwd", "/assets/../../code.py", "/%00",
    "/" + "a" * 30_000, "/assets", "/api", "/api/", "/api/scene", "/api/scene/", "/api/scene/../about", "/%ff", "/%zz",
    "/index.html%00.js", "/model/config.json", "/stories.json", "/static/index.html",
)  # fmt: skip
HEADS = (
    {"Host": "example.org"}, {"Host": ""}, {"Host": "127.0.0.1.example.org"}, {"Host": "a" * 5000}, {"Host": "[::1"},
    {"Origin": "https://example.org"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1.example.org"}, {"Content-Length": "-1"},
    {"Content-Length": "9" * 40}, {"Content-Length": "x"}, {"Transfer-Encoding": "rot13"},
)  # fmt: skip


class Page:
    """A running server, and what a trial asks of it."""

    def __init__(self):
        listener, up = listen(), threading.Event()
        self.port = listener.getsockname()[1]
        threading.Thread(target=serve, args=(listener, Library(), lambda url: up.set()), daemon=True).start()
        up.wait(60)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None):
        """Status and body; whatever follows is asked on a line of its own."""
        line = http.client.HTTPConnection(HOST, self.port, timeout=30)
        line.putrequest(method, "/", skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        line._buffer[0] = f"{method} {path} HTTP/1.1".encode("latin-1")  # type: ignore[attr-defined]  # as it is
        for name, value in (headers or {}).items():
            line.putheader(name, value)
        if body is not None and "Content-Length" not in (headers or {}):
            line.putheader("Content-Length", str(len(body)))
        line.endheaders(body)
        answer = line.getresponse()
        content = answer.read()
        line.close()
        return answer.status, content

    def refuses(self, *request, **more) -> str | None:
        """None if it answers 4xx, in a sentence where it is its own refusal, and answers others as before."""
        try:
            status, content = self.ask(*request, **more)
        except (http.client.HTTPException, ConnectionError):  # it hung up
            status, content = 400, b"it hung up"
        if not 400 <= status < 500:
            return f"answered {status}, {content[:100]!r}"
        if content[:1] == b"{" and len(json.loads(content)["error"].split()) < 3:
            return f"says {content[:200]!r}"
        if len(content) > 2000 or b"Traceback" in content:
            return f"says {len(content)} bytes, {content[:100]!r}"
        return self.lives()

    def lives(self) -> str | None:
        status, content = self.ask("GET", "/index.html")
        return (
            None if (status, content) == (200, (STATIC / "index.html").read_bytes()) else f"the page is gone ({status})"
        )

    def raw(self, sent: bytes, close: bool) -> str | None:
        """None if what is no request is answered with a refusal or with the line's end, in time."""
        with socket.create_connection((HOST, self.port), timeout=20) as line:
            try:
                line.sendall(sent)
                if close:
                    line.shutdown(socket.SHUT_WR)
                said = line.recv(4000)
            except TimeoutError:
                return "waits for ever"
            except ConnectionError:
                said = b""
        return self.lives() if said == b"" or said.startswith(b"HTTP/1.1 4") else f"answered {said[:100]!r}"

    def many(self, count: int) -> str | None:
        """None if so many silent lines leave the page reachable, at once or once their time is over."""
        lines = [socket.create_connection((HOST, self.port), timeout=20) for _ in range(count)]
        ended = sum(line.recv(10) in (b"", b"HTTP/1.1 5") for line in lines)
        for line in lines:
            line.close()
        return self.lives() if ended == count else f"only {ended} of {count} were ended"


def requests(page: Page) -> Iterator[tuple[str, object]]:
    """name -> call that says what is wrong, or None."""
    post = lambda scene, body: lambda: page.refuses("POST", f"/api/scene/{scene}", body, JSON)
    for scene, arguments in GOOD.items():
        for name, value in ((each, value) for each in arguments for value in WRONG[each]):
            if (name, value) in (("start", "-5"), ("angle", "-5"), ("angle", "1e308")):
                continue
            held = {**{k: json.dumps(v) for k, v in arguments.items()}, name: value}
            body = "{" + ", ".join(f'"{k}": {v}' for k, v in held.items()) + "}"
            yield f"{scene}, {name} {value[:20]}", post(scene, body.encode())
        for name in (each for each in arguments if each != "positions"):  # which has a default
            yield (
                f"{scene} without {name}",
                post(scene, json.dumps({k: v for k, v in arguments.items() if k != name}).encode()),
            )
    for scene, body in itertools.product(("worked", "hybrid"), BODIES):
        if (scene, body[:2]) != ("hybrid", b"{}") or body == b"{}{}":
            yield f"{scene}, body {body[:20]!r}", post(scene, body)
    for scene in ("", "nothing", "Watched", "__class__", "torch", "chunk_of_sentence", "a" * 500, "%00"):
        yield f"scene {scene[:20]}", post(scene, b"{}")
    for path in PATHS:
        yield f"path {path[:30]}", lambda path=path: page.refuses("GET", path)
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "FROB"):
        yield f"method {method}", lambda method=method: page.refuses(method, "/")
    for kind in ("", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        yield f"type {kind}", lambda kind=kind: page.refuses("POST", "/api/scene/hybrid", b"{}", {"Content-Type": kind})
    for head in HEADS:
        yield f"head {head}"[:60], lambda head=head: page.refuses("POST", "/api/scene/hybrid", b"{}", {**JSON, **head})
    draw = random.Random(0)
    start = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for i in range(30):
        sent = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 400)))
        yield f"noise {i}", lambda sent=sent: page.raw(sent, True)
    for i in range(30):
        at = draw.randrange(len(start) - 2)
        broken = (
            start[:at] + bytes([draw.choice((0, 10, 13, 32, 255))]) + start[at + 1 : draw.randrange(at + 1, len(start))]
        )
        yield f"broken request {i}", lambda broken=broken: page.raw(broken[:-1], False)
    for cut in (0, 1, 5, 16, 30, len(start) - 2):
        yield f"silence after {cut} bytes", lambda cut=cut: page.raw(start[:cut], False)
    yield (
        "a body that does not come",
        lambda: page.raw(start[:-2].replace(b"GET", b"POST") + b"Content-Length: 9\r\n\r\n", False),
    )
    yield "headers without end", lambda: page.raw(start[:-2] + b"X: y\r\n" * 50_000, False)
    for count in (20, 200):
        yield f"{count} silent lines", lambda count=count: page.many(count)


def trials(folder: Path) -> Iterable[Trial]:
    from palimpsest.explainer import scenes

    page = Page()
    for scene, arguments in GOOD.items():
        assert set(arguments) == set(signature(scenes.SCENES[scene]).parameters) - {"model"}, scene
        status, content = page.ask("POST", f"/api/scene/{scene}", json.dumps(arguments).encode(), JSON)
        assert status == 200, content
    server.PATIENCE = 2.0  # from here on, with those who say nothing
    for name, run in requests(page):
        yield Trial(name, run)  # type: ignore[arg-type]


CAMPAIGNS = [
    Campaign(
        "explainer's server, hostile requests",
        "arguments, bodies, paths, hosts, noise, silence: refused or ended in time, and the page is served as before",
        trials,
        60.0,
    )
]
