"""Who may ask, what is refused before it costs anything, and that nothing secret is said."""

import json
import logging
import socket
import time

import pytest
from served import Served, serving

import llamita
from llamita.engine.llm import LLM
from llamita.errors import InputError
from llamita.serve import run, start
from llamita.serve.guard import host_name
from llamita.serve.keys import Keys, read_keys

KEY, OTHER, ADMIN = "sk-first-key-123", "sk-second-key-456", "sk-admin-key-789"
CHAT = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 2}
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return llamita.load("embedded", scheme="llama3.2")


@pytest.fixture(scope="module")
def server(llm: LLM):
    with serving({"embedded": llm}) as served:
        yield served


@pytest.fixture(scope="module")
def locked(llm: LLM):
    with serving({"embedded": llm}, keys=Keys([KEY, OTHER], [ADMIN])) as served:
        yield served


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/load", "/v1/models/embedded", "/openapi.json"])
def test_without_a_key_nothing_is_told(locked: Served, path: str) -> None:
    status, headers, _ = locked.ask("GET", path)
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert locked.ask("GET", path, headers=BEARER)[0] == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/health", "/"])
def test_what_a_balancer_and_the_page_ask_is_open(locked: Served, path: str) -> None:
    assert locked.ask("GET", path)[0] == 200


@pytest.mark.parametrize("key", ["", "x", KEY[:-1], KEY + "x", KEY.upper(), "\u00e9" * 9])
def test_a_wrong_key_is_refused(locked: Served, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
    status, error = locked.refuse("/v1/chat/completions", CHAT, headers)
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert not key or key not in error["message"]


def test_every_key_and_both_headers_are_taken(locked: Served) -> None:
    for headers in (BEARER, {"Authorization": f"Bearer {OTHER}"}, {"X-Api-Key": OTHER}, {"X-Api-Key": ADMIN}):
        assert locked.ask("POST", "/v1/chat/completions", CHAT, headers)[0] == 200


def test_keys_are_never_logged(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        locked.ask("POST", "/v1/chat/completions", CHAT, BEARER)
        locked.refuse("/v1/chat/completions", CHAT, {"Authorization": "Bearer sk-wrong-key-000"})
    assert "/v1/chat/completions" in caplog.text
    assert KEY not in caplog.text
    assert "sk-wrong" not in caplog.text
    assert "Once" not in caplog.text


def test_keys_are_compared_as_digests_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("llamita.serve.keys.hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    keys = Keys([KEY, OTHER], [ADMIN])
    assert keys.owner(KEY) is not None
    assert len(compared) == 3  # no early end tells how far a key was right
    assert all(len(a) == len(b) == 32 for a, b in compared)
    assert KEY not in repr(vars(keys))


def test_a_file_of_keys(tmp_path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# mine\n{KEY}\n\n{OTHER}\n")
    assert read_keys(path) == [KEY, OTHER]
    for content in ("", "# none\n", "short\n", "with space in it\n"):
        path.write_text(content)
        with pytest.raises(InputError) as error:
            read_keys(path)
        assert "short" not in str(error.value)
    with pytest.raises(InputError):
        read_keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "localhost.evil:80"])
def test_another_host_is_refused(server: Served, host: str) -> None:
    status, _, data = server.ask("GET", "/v1/models", headers={"Host": host})
    assert status in (400, 403)
    assert b"embedded" not in data


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8080", "LOCALHOST:99"])
def test_this_machines_names_are_taken(server: Served, host: str) -> None:
    assert server.ask("GET", "/v1/models", headers={"Host": host})[0] == 200


def test_host_names() -> None:
    assert host_name("a.b:80") == "a.b"
    assert host_name("[::1]:80") == "::1"
    assert host_name("a@b") == "b"
    assert host_name("[") == ""


def test_a_page_of_another_origin_may_not_ask(server: Served) -> None:
    status, error = server.refuse("/v1/chat/completions", CHAT, {"Origin": "https://evil.example"})
    assert (status, error["code"]) == (403, "origin")
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.ask("POST", "/v1/chat/completions", CHAT, own)[0] == 200


def test_there_is_no_cors_unless_it_is_allowed(server: Served, llm: LLM) -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = server.ask("OPTIONS", "/v1/chat/completions", headers=asked)
    assert status == 405
    assert not [name for name in headers if name.startswith("access-control")]
    with serving({"embedded": llm}, origins=["https://app.example"]) as allowing:
        named = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}  # OpenAI's library
        status, headers, _ = allowing.ask("OPTIONS", "/v1/chat/completions", headers={**asked, **named})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
        status, headers, _ = allowing.ask("POST", "/v1/chat/completions", CHAT, {"Origin": "https://app.example"})
        assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert allowing.refuse("/v1/chat/completions", CHAT, {"Origin": "https://evil.example"})[0] == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_what_a_form_could_send_is_refused(server: Served, kind: str) -> None:
    assert server.refuse("/v1/chat/completions", CHAT, {"Content-Type": kind})[0] == 415


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'{"a": NaN}', b"\xff\xfe", b'{"messages": ' + b"[" * 100_000, b"1" * 5000]
)
def test_a_body_that_is_no_object_is_refused(server: Served, body: bytes) -> None:
    assert server.refuse("/v1/chat/completions", body)[0] == 400


def test_a_body_too_large_is_refused_before_it_is_read(llm: LLM) -> None:
    with serving({"embedded": llm}, limits=start.Limits(body_bytes=1000, drain_seconds=1)) as small:
        assert small.refuse("/v1/chat/completions", b" " * 1001)[0] == 413
        with socket.create_connection(("127.0.0.1", small.port), 10) as peer:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            peer.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + (b"3e8\r\n" + b" " * 1000 + b"\r\n") * 2)
            assert b" 413 " in peer.recv(4096)
        assert small.ask("POST", "/v1/chat/completions", CHAT)[0] == 200


def _rest(peer: socket.socket) -> bytes:
    parts = []
    while part := peer.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_a_head_too_large_is_refused(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as peer:
        peer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * run.HEAD_BYTES)
        answer = _rest(peer)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_request"


@pytest.mark.parametrize("is_second", [False, True])
@pytest.mark.parametrize("sent", [b"G", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_a_slow_head_is_cut(server: Served, monkeypatch: pytest.MonkeyPatch, sent: bytes, is_second: bool) -> None:
    monkeypatch.setattr(run, "HEAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), 10) as peer:
        if is_second:
            peer.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b"ok" not in answer:
                answer += peer.recv(65536)
        peer.sendall(sent)
        began = time.monotonic()
        _rest(peer)  # the end of the connection
        assert time.monotonic() - began < 8  # KEEP_ALIVE_SECONDS would be 30


def test_a_slow_body_is_cut(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamita.serve.exchange.BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), 10) as peer:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        peer.sendall(head + b"Content-Length: 50\r\n\r\n{")
        assert peer.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_too_many_connections_are_refused(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MOST_CONNECTIONS", 3)
    peers = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(4)]
    try:
        assert peers[3].recv(4096).startswith(b"HTTP/1.1 503 ")
    finally:
        for peer in peers:
            peer.close()


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py",
        "/page/..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
        "/page/%00",
        "/page/index.html/..",
        "/../../etc/passwd",
        "/page/..\\app.py",
    ],
)
def test_no_path_leaves_the_page(server: Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as peer:
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = _rest(peer)
    assert answer.startswith(b"HTTP/1.1 404 ")


def test_the_page_carries_its_policy(server: Served) -> None:
    status, headers, _ = server.ask("GET", "/")
    assert status == 200
    policy = headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "trusted-types 'none'"):
        assert rule in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert server.ask("GET", "/", headers={"If-None-Match": headers["etag"]})[0] == 304


def test_a_request_id_comes_back_if_it_is_safe(server: Served) -> None:
    assert server.ask("GET", "/health", headers={"X-Request-Id": "my-1.2"})[1]["x-request-id"] == "my-1.2"
    for wrong in ("a b", "x" * 65, "<script>"):
        assert server.ask("GET", "/health", headers={"X-Request-Id": wrong})[1]["x-request-id"].startswith("req_")


def test_a_fault_of_ours_tells_nothing(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("secret at 0x7f00")

    monkeypatch.setattr("llamita.serve.chat.prepare", fail)
    status, error = server.refuse("/v1/chat/completions", CHAT)
    assert (status, error["type"]) == (500, "server_error")
    assert "secret" not in error["message"]


def test_other_paths_and_methods(server: Served) -> None:
    assert server.refuse("/v1/nothing", CHAT)[0] == 404
    status, headers, _ = server.ask("GET", "/v1/chat/completions")
    assert (status, headers["allow"]) == (405, "POST")
