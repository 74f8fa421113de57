"""Servers that fail in every way we know of: FAULTS, by name.

A fault is what one does to a request that a sound server would answer with `sound`, a JSON value.
`outcome` tells what a client should make of it: "answer" (it is sound, if unusual), "transient"
(asked again until the attempts are used up), or "final" (asked once)."""

import contextlib
import gzip
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LONG = 20.0  # seconds: beyond every bound that a test waits for


@dataclass(frozen=True)
class Fault:
    outcome: str
    act: Callable  # (connection, sound) -> None

    @property
    def stalls(self) -> bool:
        """Whether a client's clock ends it."""
        return self.outcome == transient and getattr(self.act, "stalls", False)


class Connection:
    """One accepted connection: what a fault may do with it."""

    def __init__(self, handler):
        self.handler, self.closing = handler, handler.server.closing
        handler.close_connection = True

    def send(self, data: bytes) -> None:
        self.handler.wfile.write(data)

    def wait(self, seconds: float = LONG) -> None:
        self.closing.wait(seconds)

    def drip(self, data: bytes, pause: float = 0.05) -> None:
        """A byte at a time, for ever: the last one again and again."""
        for i in range(int(LONG / pause)):
            self.send(data[min(i, len(data) - 1) :][:1])
            self.closing.wait(pause)
            if self.closing.is_set():
                return

    def flood(self, data: bytes) -> None:
        while not self.closing.is_set():  # until the client hangs up
            self.send(data)

    def reset(self) -> None:
        """RST in place of FIN."""
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                           struct.pack("ii", 1, 0))
        self.handler.connection.close()


def packed(sound) -> bytes:
    return sound if isinstance(sound, bytes) else json.dumps(sound).encode()


def whole(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", *headers,
             f"Content-Length: {len(body) if length is None else length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def chunks(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def says(*pieces) -> Callable:
    """Send pieces, each bytes or a function of the sound body."""
    def act(c, sound):
        for piece in pieces:
            c.send(piece if isinstance(piece, bytes) else piece(packed(sound)))
    return act


def says_and_waits(*pieces) -> Callable:
    def act(c, sound):
        says(*pieces)(c, sound)
        c.wait()
    act.stalls = True
    return act


def drips(start: bytes, rest: bytes) -> Callable:
    def act(c, sound):
        c.send(start)
        c.drip(rest)
    act.stalls = True
    return act


def floods(start: bytes, rest: bytes) -> Callable:
    def act(c, sound):
        c.send(start)
        c.flood(rest)
    act.stalls = True
    return act


def resets(start: bytes) -> Callable:
    def act(c, sound):
        c.send(start)
        c.reset()
    return act


def status(line: str, *headers: str, body: bytes = b'{"error": "no"}') -> Callable:
    return says(whole(body, *headers, status=line))


def deep_gzip(body: bytes) -> bytes:
    return gzip.compress(gzip.compress(body))


GZIP = "Content-Encoding: gzip"
FLAGS_NAME = b"\x1f\x8b\x08\x08" + b"\0" * 6  # a gzip header whose file name follows
answer, transient, final = "answer", "transient", "final"
FAULTS: dict[str, Fault] = {name: Fault(outcome, act) for name, outcome, act in [
    # --- before the status line
    ("hangs", transient, says_and_waits()),
    ("hangs up", transient, says()),
    ("resets", transient, resets(b"")),
    ("no HTTP", transient, says(b"SSH-2.0-OpenSSH_9.6\r\n")),
    ("binary", transient, says(bytes(range(256)) * 8)),
    ("a TLS alert", transient, says(b"\x15\x03\x01\x00\x02\x02\x28")),
    ("endless blank lines", transient, floods(b"", b"\r\n" * 1000)),
    ("HTTP/0.9", transient, says(lambda body: body)),
    # --- the status line
    ("drips its status line", transient, drips(b"", b"HTTP/1.1 200 OKKK")),
    ("endless status line", transient, floods(b"HTTP/1.1 200 ", b"O" * 4096)),
    ("half a status line", transient, says(b"HTTP/1.1 2")),
    ("half a status line, hangs", transient, says_and_waits(b"HTTP/1.1 2")),
    ("status in words", transient, says(b"HTTP/1.1 fine\r\n\r\n")),
    ("status 999", transient, says(whole(b"{}", status="999 Odd"))),
    ("HTTP/3.7", transient, says(b"HTTP/3.7 200 OK\r\n\r\n{}")),
    ("endless 100 Continue", transient, floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100)),
    ("drips 100 Continue", transient, drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100)),
    ("100 Continue, then an answer", answer, says(b"HTTP/1.1 100 Continue\r\n\r\n", whole)),
    ("101 Switching Protocols", transient, says(b"HTTP/1.1 101 Switching Protocols\r\n"
                                                b"Connection: upgrade\r\nUpgrade: x\r\n\r\n")),
    ("204 without a body", final, says(b"HTTP/1.1 204 No Content\r\n\r\n")),
    ("301 to itself", final, status("301 Moved Permanently", "Location: /")),
    ("307 to nowhere", final, status("307 Temporary Redirect", "Location: http://127.0.0.1:1/")),
    ("400", final, status("400 Bad Request")),
    ("401 with escape codes", final, status("401 Unauthorized", body=b"\x1b[31m[red]who?\r\n")),
    ("404", final, status("404 Not Found")),
    ("408", transient, status("408 Request Timeout")),
    ("413", final, status("413 Content Too Large")),
    ("429", transient, status("429 Too Many Requests")),
    ("429, back in an hour", transient, status("429 Too Many Requests", "Retry-After: 3600")),
    ("429, back in -1e400", transient, status("429 Too Many Requests", "Retry-After: -1e400")),
    ("500", transient, status("500 Internal Server Error")),
    ("503, back at a date that is none", transient,
     status("503 Service Unavailable", "Retry-After: Mon, 99 Foo 2026 99:99:99 GMT")),
    # --- headers
    ("drips a header", transient, drips(HEAD, b"X-Slow: aaaa")),
    ("endless header", transient, floods(HEAD + b"X-Long: ", b"a" * 4096)),
    ("endless headers", transient, floods(HEAD, b"X-Many: a\r\n" * 100)),
    ("headers, then hangs", transient, says_and_waits(HEAD)),
    ("headers, then hangs up", transient, says(HEAD)),
    ("a header without a colon", transient, says(b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n{}")),
    ("two lengths", transient, says(HEAD + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}")),
    ("length in words", transient, says(HEAD + b"Content-Length: many\r\n\r\n{}")),
    ("negative length", transient, says(HEAD + b"Content-Length: -1\r\n\r\n{}")),
    ("a cookie and a session", answer, says(lambda body: whole(body, "Set-Cookie: a=b; Path=/"))),
    # --- the body
    ("drips its body", transient, drips(whole(b"", length=10_000), b"[ ")),
    ("body, then hangs", transient, says_and_waits(whole(b"[", length=10_000))),
    ("half a body", transient, says(whole(b"[", length=10_000))),
    ("half a body, then resets", transient, resets(whole(b"[", length=10_000))),
    ("more than its length", answer, says(whole, b"surplus")),
    ("no length, ends with the connection", answer, says(HEAD + b"\r\n", lambda body: body)),
    ("no length, no end", transient, drips(HEAD + b"\r\n", b"[ ")),
    ("empty body", transient, says(whole(b""))),
    ("33 MB", final, says(whole(b" " * (33 * 2**20)))),
    ("endless body", final, floods(HEAD + b"\r\n", b" " * 2**20)),
    # --- chunks and trailers
    ("one byte a chunk", answer, says(CHUNKED, lambda body: chunks(body, 1), b"0\r\n\r\n")),
    ("flood of tiny chunks", transient, floods(CHUNKED, b"1\r\n \r\n" * 500)),
    ("drips a chunk's size", transient, drips(CHUNKED, b"000000")),
    ("drips a chunk's extension", transient, drips(CHUNKED, b"5;name=xxxx")),
    ("endless chunk extension", transient, floods(CHUNKED + b"5;name=", b"x" * 4096)),
    ("a chunk's size in words", transient, says(CHUNKED + b"five\r\n[]\r\n")),
    ("a chunk of 2^80 bytes", transient, says(CHUNKED + b"1" + b"0" * 20 + b"\r\n[]")),
    ("half a chunk", transient, says(CHUNKED + b"ff\r\n[")),
    ("no last chunk", transient, says(CHUNKED, lambda body: chunks(body, 50))),
    ("no last chunk, hangs", transient, says_and_waits(CHUNKED, lambda body: chunks(body, 50))),
    ("drips a trailer", transient, drips(CHUNKED + b"2\r\n[]\r\n0\r\n", b"X-Late: aaaa")),
    ("endless trailers", transient, floods(CHUNKED + b"2\r\n[]\r\n0\r\n", b"X-Late: a\r\n" * 100)),
    ("a trailer", answer, says(CHUNKED, lambda body: chunks(body, 50), b"0\r\nX-Late: a\r\n\r\n")),
    # --- encodings
    ("gzip", answer, says(lambda body: whole(gzip.compress(body), GZIP))),
    ("half of its gzip", transient, says(lambda body: whole(gzip.compress(body)[:-9], GZIP))),
    ("gzip that is none", transient, says(lambda body: whole(body, GZIP))),
    ("gzip twice", transient, says(lambda body: whole(deep_gzip(body), f"{GZIP}, gzip"))),
    ("brotli", transient, says(lambda body: whole(body, "Content-Encoding: br"))),
    ("endless gzip header", final, floods(HEAD + GZIP.encode() + b"\r\n\r\n" + FLAGS_NAME,
                                          b"a" * 2**20)),
    ("drips a gzip header", transient, drips(HEAD + GZIP.encode() + b"\r\n\r\n",
                                             FLAGS_NAME + b"aaaa")),
    ("gzip of 64 MB of blanks", final, says(whole(gzip.compress(b" " * 2**26, 1), GZIP))),
    ("UTF-8 with a BOM", answer, says(lambda body: whole(b"\xef\xbb\xbf" + body))),
    ("UTF-16", transient, says(lambda body: whole(body.decode().encode("utf-16")))),
    ("broken UTF-8", transient, says(whole(b"\xff\xfe\xfd[" * 20))),
    ("null bytes", transient, says(whole(b"\0" * 100))),
    # --- JSON
    ("HTML", transient, says(whole(b"<html>busy</html>", "Content-Type: text/html"))),
    ("half of its JSON", transient, says(lambda body: whole(body[: len(body) // 2]))),
    ("JSON twice", transient, says(lambda body: whole(body + body))),
    ("200,000 brackets", transient, says(whole(b"[" * 200_000))),
    ("a number of 9,999 digits", transient, says(whole(b"9" * 9999))),
    ("null", transient, says(whole(b"null"))),
    ("true", transient, says(whole(b"true"))),
    ("a string", transient, says(whole(b'"busy"'))),
    ("{}", transient, says(whole(b"{}"))),
    ("[{}]", transient, says(whole(b"[{}]"))),
    ('{"error"}', transient, says(whole(b'{"error": {"message": "\\u001b[31m[/math]"}}'))),
    ("an answer after some pauses", answer, lambda c, sound: [
        (c.send(part), c.wait(0.02)) for part in (whole(packed(sound))[:40],
                                                  whole(packed(sound))[40:])]),
]}

# Answers of another form, by what is asked: each is transient, for the next one may be sound.
SEARCH_FORMS = {
    "documents: null": None, "documents: text is null": [{"text": None}],
    "documents: text is a list": [{"text": ["a"]}], "documents: numbers": [1, 2],
    "documents: title is a number": [{"title": 5, "text": "a"}],
    "documents: strings": ["a", "b"], "documents: no document": {"result": [[{}]]},
    "documents: two results": {"result": [[], []]}, "documents: no result": {"result": []},
    "documents: result is null": {"result": None}, "documents: an object": {"result": [{}]},
    "documents: rows are null": {"result": [None]},
    "documents: a row is null": {"result": [[None]]},
    "documents: contents is null": {"result": [[{"document": {"contents": None}}]]},
    "documents: document is a string": {"result": [[{"document": "a"}]]},
}


def completion(**choice) -> dict:
    return {"choices": [{"text": "1. a\n2. b", "finish_reason": "stop", "stop_reason": None,
                         "token_ids": [5, 6], **choice}]}


COMPLETION_FORMS = {
    "completion: null": None, "completion: no choice": {"choices": []},
    "completion: choices is null": {"choices": None},
    "completion: choice is null": {"choices": [None]},
    "completion: two choices": {"choices": completion()["choices"] * 2},
    "completion: ids are strings": completion(token_ids=["5", "6"]),
    "completion: ids are null": completion(token_ids=[None]),
    "completion: ids are negative": completion(token_ids=[5, -1]),
    "completion: ids beyond the vocabulary": completion(token_ids=[5, 10**6]),
    "completion: ids of 2^70": completion(token_ids=[2**70]),
    "completion: ids are true": completion(token_ids=[True]),
    "completion: ids are floats": completion(token_ids=[5.0]),
    "completion: ids are a string": completion(token_ids="56"),
    "completion: ids in a list of lists": completion(token_ids=[[5], [6]]),
    "completion: no ids in the list": completion(token_ids=[]),
    "completion: more ids than asked for": completion(token_ids=[5] * 100_000),
    "completion: finish_reason is null": completion(finish_reason=None),
    "completion: finish_reason is a list": completion(finish_reason=["stop"]),
    "completion: finish_reason is new": completion(finish_reason="moon"),
    "completion: text is null": completion(text=None, token_ids=None),
    "completion: text is a number": completion(text=5, token_ids=None),
    "completion: text is a list": completion(text=["a"], token_ids=None),
}
# Of a policy, whose log-probs are needed, too.
LOGPROB_FORMS = {f"log-probs: {name}": completion(logprobs={"token_logprobs": logprobs})
                 for name, logprobs in {
                     "null": None, "too few": [-1.0], "too many": [-1.0] * 3, "strings": ["a", "b"],
                     "NaN": [-1.0, float("nan")], "infinite": [-1.0, float("-inf")],
                     "nulls": [None, None], "of 1e400": [-1.0, -10**400]}.items()}
MODELS_FORMS = {f"/models: {name}": body for name, body in {
    "null": None, "a list": [], "no data": {}, "data is null": {"data": None},
    "data is empty": {"data": []}, "a model is null": {"data": [None]},
    "id is null": {"data": [{"id": None}]}, "id is a number": {"data": [{"id": 5}]},
    "id is a list": {"data": [{"id": ["a"]}]}, "id is empty": {"data": [{"id": ""}]},
    "root is a number": {"data": [{"id": "a", "root": 5}]},
    "root has control characters": {"data": [{"id": "a", "root": "/tmp/\0"}]}}.items()}


def misbehave(fault: str, handler, sound) -> None:
    """Answer a request by the named fault; a name that is none gets the sound answer."""
    connection = Connection(handler)
    forms = SEARCH_FORMS | COMPLETION_FORMS | LOGPROB_FORMS | MODELS_FORMS
    with contextlib.suppress(OSError, ValueError):  # the client has hung up
        if fault in forms:
            connection.send(whole(json.dumps(forms[fault]).encode()))
        elif fault in FAULTS:
            FAULTS[fault].act(connection, sound)
        else:
            connection.send(whole(packed(sound)))
