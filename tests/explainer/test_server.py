"""The server answers its own page, on this machine, and no one else."""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from palimpsest.explainer import scenes, server
from palimpsest.explainer.scene_file import from_safetensors
from palimpsest.explainer.server import HOST, MAX_BODY, Library, listen


def ask(address: str, method: str, path: str, body: bytes | str | None = None, **headers: str):
    """Status, headers and body of one request, its path sent as it is."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(HOST, place.port, timeout=60)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), content


def scene(address: str, scene_name: str, **arguments):
    return ask(address, "POST", f"/api/scene/{scene_name}", json.dumps(arguments), content_type="application/json")


def error(content: bytes) -> str:
    return json.loads(content)["error"]


def test_the_page_comes_with_its_parts_and_its_guards(address):
    status, headers, content = ask(address, "GET", "/")
    assert status == 200
    assert b'content="live"' in content
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    status, headers, _ = ask(address, "GET", "/assets/index.js")
    assert status == 200
    assert "javascript" in headers["content-type"]
    assert ask(address, "GET", "/assets/KaTeX_Math-Italic.woff2")[0] == 200


def test_a_scene_is_the_librarys(address, library):
    status, _, content = scene(address, "sentence", text="The door is red.", layer=1, head=2)
    assert status == 200
    expected = scenes.sentence(library.get()[1], "The door is red.", 1, 2)
    assert from_safetensors(content)["written"].equal(expected["written"])
    assert from_safetensors(content)["beta"].equal(expected["beta"])
    status, _, content = scene(address, "worked", name="walk")
    assert from_safetensors(content)["written"][0].tolist() == [[10, 10], [5, 5]]


def test_about_and_code(address):
    about = json.loads(ask(address, "GET", "/api/about")[2])
    assert about["model"]["layer_types"] == ["kda", "kda", "kda", "mla"]
    assert set(json.loads(ask(address, "GET", "/api/code")[2])) == {
        "whiteboard",
        "answer",
        "inside",
        "touch",
        "family",
        "chunks",
        "hybrid",
    }


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py", "/assets/../../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "//etc/passwd",
        "/assets/%2e%2e%2f%2e%2e%2fmodel/config.json", "/index.html/..", "/assets", "/%00", "/model/config.json",
    ],
)  # fmt: skip
def test_only_the_pages_own_files_can_be_had(address, path):
    status, _, content = ask(address, "GET", path)
    assert status == 404
    assert "There is no page" in error(content)


@pytest.mark.parametrize(
    "host", ["example.org", "127.0.0.1.example.org", "example.org:80", "0.0.0.0", "[::1]", "", "@"]
)
def test_another_host_is_refused(address, host):
    for path in ("/", "/api/about", "/nothing"):
        status, headers, content = ask(address, "GET", path, Host=host)
        assert status == 400
        assert b"Invalid host" in content
        assert "default-src 'self'" in headers["content-security-policy"]


def test_two_hosts_are_refused(address):
    with socket.create_connection((HOST, urlsplit(address).port), timeout=60) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: example.org\r\n\r\n")
        assert line.recv(200).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("origin", ["https://example.org", "null", "http://127.0.0.1:1", "http://localhost"])
def test_another_origin_is_refused(address, origin):
    status, headers, _ = ask(address, "POST", "/api/scene/hybrid", "{}", content_type="application/json", Origin=origin)
    assert status == 403
    assert "access-control-allow-origin" not in headers


def test_its_own_origin_is_not(address):
    origin = address.rstrip("/")
    assert ask(address, "POST", "/api/scene/hybrid", "{}", content_type="application/json", Origin=origin)[0] == 200
    local = origin.replace(HOST, "localhost")
    assert ask(address, "GET", "/", Host=urlsplit(local).netloc, Origin=local)[0] == 200


def test_what_is_too_large_is_not_read(address):
    status, _, content = ask(
        address, "POST", "/api/scene/sentence", b"x" * (MAX_BODY + 1), content_type="application/json"
    )
    assert status == 413
    assert str(MAX_BODY) in error(content)

    def pieces():
        for _ in range(2 * MAX_BODY // 1024):
            yield b"x" * 1024

    place = urlsplit(address)
    connection = http.client.HTTPConnection(HOST, place.port, timeout=60)
    connection.request(
        "POST", "/api/scene/sentence", pieces(), {"content-type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x00",
    ],
)
def test_what_is_no_http_is_turned_away(address, raw):
    with socket.create_connection((HOST, urlsplit(address).port), timeout=60) as line:
        line.sendall(raw)
        line.shutdown(socket.SHUT_WR)
        answer = line.recv(200)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert ask(address, "GET", "/")[0] == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "Invalid JSON"),
        ("{", "Invalid JSON"),
        ("[" * 20_000, "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        ("[]", "an object. The arguments are text, layer, head"),
        ('{"text": "a", "layer": 0}', "head: Field required"),
        ('{"text": "a", "layer": 0, "head": 0, "x": 1}', "x, which is '1': Extra inputs are not permitted"),
        ('{"text": 1, "layer": 0, "head": 0}', "text, which is '1': Input should be a valid string"),
        ('{"text": "a", "layer": true, "head": 0}', "layer, which is 'True': Input should be a valid integer"),
        ('{"text": "a", "layer": 0.5, "head": 0}', "a valid integer"),
        ('{"text": "a", "layer": 99999999999999999999, "head": 0}', "cannot be watched"),
        ('{"text": "", "layer": 0, "head": 0}', "empty"),
        ('{"text": "' + "a" * 5000 + '", "layer": 0, "head": 0}', "5000 tokens; up to 256"),
    ],
)
def test_a_malformed_request_hears_what_is_wrong(address, body, says):
    status, _, content = ask(address, "POST", "/api/scene/sentence", body, content_type="application/json")
    assert status == 400
    assert says in error(content)


@pytest.mark.parametrize(
    "start", [b"", b"GET / HT", b"POST /api/scene/hybrid HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{"]
)
def test_who_says_nothing_more_is_not_waited_for(monkeypatch, run_server, library, start):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    with run_server(library) as url, socket.create_connection((HOST, urlsplit(url).port), timeout=60) as line:
        line.sendall(start)
        said = line.recv(1000)  # the server ends it, or this raises after a minute
        assert said.startswith(b"HTTP/1.1 408") if b"POST" in start else said == b""
        assert ask(url, "GET", "/")[0] == 200


def test_a_line_that_is_kept_open_is_not_cut_between_its_requests(monkeypatch, run_server, library):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    with run_server(library) as url:
        connection = http.client.HTTPConnection(HOST, urlsplit(url).port, timeout=60)
        for _ in range(3):
            connection.request("GET", "/")
            assert connection.getresponse().read()
            time.sleep(0.4)
        connection.sock.sendall(b"GET / HT")
        assert connection.sock.recv(100) == b""
        connection.close()


def test_numbers_beyond_all_reason_are_refused(address):
    for number in ("1e400", "NaN", "-1e9", "Infinity"):
        body = f'{{"story": "twice", "beta": {number}, "keep": [1, 1]}}'
        status, _, content = ask(address, "POST", "/api/scene/family", body, content_type="application/json")
        assert status == 400, content


def test_other_methods_types_and_scenes(address):
    assert ask(address, "POST", "/")[0] == 405
    assert ask(address, "GET", "/api/scene/hybrid")[0] in (404, 405)
    assert ask(address, "POST", "/api/scene/hybrid", "{}", content_type="text/plain")[0] == 415
    status, _, content = scene(address, "nothing")
    assert status == 400
    assert "There is no scene" in error(content)
    status, _, content = scene(address, "SCENES")
    assert status == 400
    assert "There is no scene" in error(content)


def test_two_readers_at_once(address, library):
    texts = [f"The door is {colour}. Now the lamp is gold." for colour in ("red", "blue", "grey", "black")] * 4
    with ThreadPoolExecutor(8) as readers:
        answers = list(readers.map(lambda text: scene(address, "sentence", text=text, layer=0, head=1), texts))
    model = library.get()[1]
    for text, (status, _, content) in zip(texts, answers):
        assert status == 200
        assert from_safetensors(content)["written"].equal(scenes.sentence(model, text, 0, 1)["written"])


def test_a_checkpoint_that_cannot_be_used_is_said_on_the_page(tmp_path, run_server):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with run_server(Library(tmp_path)) as url:
        assert ask(url, "GET", "/")[0] == 200
        status, _, content = ask(url, "GET", "/api/about")
        assert status == 400
        assert "'llama'" in error(content)


def test_a_port_in_use_is_a_sentence():
    with listen() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be used"):
            listen(port)
    with pytest.raises(ValueError, match="expected 0 to 65535"):
        listen(70_000)


def test_it_listens_on_this_machine_alone():
    with listen() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_the_library_is_loaded_once_and_only_when_asked(monkeypatch):
    loads = []
    monkeypatch.setattr(
        server.Library, "_load", lambda self, future: (loads.append(1), future.set_result((None, None)))
    )
    library = Library()
    assert loads == []
    threads = [threading.Thread(target=library.get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]
