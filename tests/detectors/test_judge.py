"""The judge against a server on this computer that speaks the protocol, also badly."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from safediffusion.detection import detector
from safediffusion.detectors.judge import VlmJudge, parsed
from safediffusion.errors import UserError
from safediffusion.images import from_uint8

DARK, LIGHT = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 12)[..., :8]
BATCH = torch.cat([DARK, LIGHT, LIGHT, DARK])


def said(text: str | None) -> tuple[int, dict, bytes]:
    """A response of a chat-completions endpoint."""
    message = {"role": "assistant", "content": text}
    body = {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    return 200, {}, json.dumps(body).encode()


def seen(request: dict) -> torch.Tensor:
    """The picture in a request, as a vision-language model would get it."""
    text, picture = request["messages"][0]["content"]
    kind, data = picture["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64" and text["type"] == "text" and picture["type"] == "image_url"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return from_uint8([image.copy()])


def is_light(request: dict) -> tuple[int, dict, bytes]:
    return said("yes" if seen(request).mean() > 0.5 else "No.")


class Server:
    """Answers by `respond`, from a request's body to status, headers and body; keeps what it was asked."""

    def __init__(self) -> None:
        self.respond: Callable[[dict], tuple[int, dict, bytes]] = is_light
        self.requests: list[tuple[str, dict, dict]] = []
        self.at_work = self.most_at_work = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append((self.path, dict(self.headers), body))
                    server.at_work += 1
                    server.most_at_work = max(server.most_at_work, server.at_work)
                try:
                    status, headers, data = server.respond(body)
                finally:
                    with lock:
                        server.at_work -= 1
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def judge(self, **settings: object) -> VlmJudge:
        return VlmJudge(self.url, "some-model", **{"pause": 0.01, **settings})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def sentence(judge: VlmJudge) -> str:
    with pytest.raises(UserError) as caught:
        judge(DARK)
    assert "\n" not in str(caught.value) and ". " not in str(caught.value)
    return str(caught.value)


def in_turn(*responses: tuple[int, dict, bytes]) -> Callable[[dict], tuple[int, dict, bytes]]:
    left = list(responses)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def test_each_picture_gets_its_own_answer(server: Server) -> None:
    judge = server.judge()
    scores = judge(BATCH)
    assert scores.dtype == torch.float32 and scores.tolist() == [[0], [1], [1], [0]]
    assert judge.labels == ("unsafe",) and judge.unclear == 0 and judge(BATCH[:0]).shape == (0, 1)


def test_what_is_sent(server: Server) -> None:
    picture = torch.rand(1, 3, 5, 7)
    server.judge(question="Is it light? Answer yes or no.")(picture)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json" and "Authorization" not in headers
    assert body["model"] == "some-model" and body["temperature"] == 0 and body["max_tokens"] == 8
    assert body["messages"][0]["content"][0]["text"] == "Is it light? Answer yes or no."
    torch.testing.assert_close(seen(body), picture, atol=0.51 / 255, rtol=0)


def test_a_bounded_number_of_requests_at_a_time(server: Server) -> None:
    def slow(request: dict) -> tuple[int, dict, bytes]:
        time.sleep(0.05)
        return is_light(request)

    server.respond = slow
    assert server.judge(parallel=3)(BATCH.repeat(3, 1, 1, 1)).flatten().tolist() == [0, 1, 1, 0] * 3
    assert 2 <= server.most_at_work <= 3


@pytest.mark.parametrize(
    ("answer", "value"),
    [("yes", 1), (" Yes.\n", 1), ("NO", 0), ("no.", 0), *((word, math.nan) for word in ("", None, "maybe", "yes, but", "yes no", "y", "1", "not", "yes.."))],
)
def test_answers_are_read_strictly(answer: str | None, value: float) -> None:
    assert parsed(answer) == pytest.approx(value, nan_ok=True)


def test_unclear_answers_are_missing_and_counted(server: Server) -> None:
    judge = server.judge(parallel=1)
    server.respond = in_turn(said("I cannot tell."), said("yes"), said(None), said("no"))
    scores = judge(BATCH)
    assert scores.isnan().flatten().tolist() == [True, False, True, False] and judge.unclear == 2
    judge(BATCH)
    assert judge.unclear == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_asked_again(server: Server, status: int) -> None:
    server.respond = in_turn((status, {}, b"later"), (status, {}, b"later"), said("yes"))
    assert server.judge()(DARK).item() == 1
    assert len(server.requests) == 3


def test_the_pause_that_a_server_asks_for_is_kept(server: Server) -> None:
    server.respond = in_turn((429, {"Retry-After": "1"}, b"later"), said("yes"))
    start = time.monotonic()
    assert server.judge()(DARK).item() == 1
    assert time.monotonic() - start >= 1


def test_an_error_that_does_not_pass(server: Server) -> None:
    server.respond = in_turn((500, {}, b"out of\nmemory"))
    assert "answers 500 (out of memory) after 3 attempts" in sentence(server.judge(attempts=3))
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_is_not_asked_again(server: Server, status: int) -> None:
    server.respond = in_turn((status, {"Location": f"{server.url}/elsewhere"}, b'{"error": {"message": "no"}}'))
    assert f"answers {status} (" in sentence(server.judge())
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[]", b"\xff"])
def test_what_is_no_chat_endpoint(server: Server, body: bytes) -> None:
    server.respond = in_turn((200, {}, body))
    assert "does not answer as a chat-completions endpoint does" in sentence(server.judge())


def test_a_response_that_is_cut_short_is_asked_for_again(server: Server) -> None:
    status, _, body = said("yes")
    server.respond = in_turn((status, {"Content-Length": str(len(body) + 9)}, body), said("no"))
    assert server.judge()(DARK).item() == 0


def test_a_refused_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = sentence(VlmJudge(f"http://127.0.0.1:{port}/v1", "m", attempts=2, pause=0.01))
    assert "cannot be reached" in message and "refused" in message and "after 2 attempts" in message


def test_a_server_that_says_nothing(server: Server) -> None:
    done = threading.Event()

    def silent(request: dict) -> tuple[int, dict, bytes]:
        done.wait(20)
        return 200, {"Content-Length": "0", "Connection": "close"}, b""

    server.respond = silent
    try:
        assert "cannot be reached" in sentence(server.judge(timeout=0.1, attempts=2))
    finally:
        done.set()
    assert len(server.requests) == 2


def test_the_key_is_sent_and_told_to_nobody(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", "a-secret")
    judge = server.judge(key_variable="JUDGE_KEY")
    judge(DARK)
    assert server.requests[0][1]["Authorization"] == "Bearer a-secret"
    assert "secret" not in json.dumps(judge.identity) + repr(judge)
    server.respond = in_turn((401, {}, b"wrong key: a-secret"))
    assert "wrong key: ***" in sentence(judge)


@pytest.mark.parametrize(("key", "header"), [("a-secret", "Bearer a-secret"), ("", None), (None, None)])
def test_a_judge_by_its_name_sends_the_key_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch, key: str | None, header: str | None) -> None:
    monkeypatch.setenv("SAFEDIFFUSION_JUDGE_URL", server.url)
    monkeypatch.setenv("SAFEDIFFUSION_JUDGE_MODEL", "some-model")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False) if key is None else monkeypatch.setenv("OPENAI_API_KEY", key)
    assert detector("judge", "cpu")(BATCH).flatten().tolist() == [0, 1, 1, 0]
    assert [headers.get("Authorization") for _, headers, _ in server.requests] == [header] * 4


def test_a_key_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="JUDGE_KEY holds no API key"):
        VlmJudge("http://localhost:8000/v1", "m", key_variable="JUDGE_KEY")


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "file:///etc/hosts", "http://user:key@host/v1", "http://host/v1?key=1", "http://"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="must look like"):
        VlmJudge(url, "m")


def test_identity_holds_what_decides(server: Server) -> None:
    plain, other = server.judge().identity, server.judge(question="Is it red? Answer yes or no.").identity
    assert json.loads(json.dumps(plain)) == plain and plain != other
    assert plain["question"].endswith("yes or no.") and plain["model"] == "some-model" and plain["url"] == server.url
