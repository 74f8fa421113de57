"""One call to a server that fails, stalls or hangs up: each ends, in its bound."""

import random
import socket
import time

import numpy as np
import pytest

from plumbing.remote import OutsideError, RetryPolicy, call, retry_after

QUICK = RetryPolicy(timeout=0.4, attempts=3, first_wait=0.02, longest_wait=0.2)
SLACK = 0.5  # seconds that a busy machine may add to a bound


def ask(url, retry_policy=QUICK):
    """The documents that the server finds."""
    return call([url], lambda answer: answer["documents"], retry_policy=retry_policy,
                json={"query": "Peru"})


def give_up(url, retry_policy=QUICK):
    """What the error says, in the bound."""
    begun = time.monotonic()
    with pytest.raises(OutsideError) as error:
        ask(url, retry_policy)
    assert time.monotonic() - begun < retry_policy.bound + SLACK
    return str(error.value)


def answer(handler, body):
    handler.reply({"documents": [f"about {body['query']}"]})


def hang(handler, body):
    handler.server.closing.wait(20)


def drip(handler, body):
    handler.begin(10_000)
    for _ in range(100):  # five seconds: long past every bound
        handler.wfile.write(b" ")
        handler.server.closing.wait(0.05)


def half_chunk(handler, body):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'ff\r\n{"result"')
    handler.close_connection = True


def reply(*args, **kwargs):
    return lambda handler, body: handler.reply(*args, **kwargs)


FAULTS = {
    "hangs": (hang, "no whole answer within 0.4 s"),
    "drips": (drip, "no whole answer within 0.4 s"),
    "500": (reply({}, 500), "HTTP 500"),
    "503, come back in an hour": (reply({}, 503, Retry_After="3600"), "HTTP 503"),
    "429, nonsense": (reply({}, 429, Retry_After="soon"), "HTTP 429"),
    "garbage": (reply(b"<html>busy</html>"), "another form"),
    "JSON of another form": (reply({"result": [[{"text": 1}]]}), "another form"),
    "deep JSON": (reply(b"[" * 200_000), "another form"),
    "half a body": (lambda handler, body: handler.break_off(), "connection failed"),
    "half a chunk": (half_chunk, "connection failed"),
    "hangs up": (lambda handler, body: setattr(handler, "close_connection", True),
                 "connection failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_in_one_clear_error_within_the_bound(serve, fault):
    behave, words = FAULTS[fault]
    server = serve(behave)
    text = give_up(server.url)
    assert words in text and "given up after 3 attempts" in text and len(server.calls) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing_but_time(serve, fault):
    server = serve(lambda handler, body: (FAULTS[fault][0] if len(server.calls) == 1 else answer)(
        handler, body))
    assert ask(server.url) == ["about Peru"] and len(server.calls) == 2


def test_a_server_that_refuses():
    with socket.socket() as bound:  # but not listening
        bound.bind(("127.0.0.1", 0))
        text = give_up(f"http://127.0.0.1:{bound.getsockname()[1]}")
    assert "connection failed" in text and "given up after 3 attempts" in text


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_asking_again_will_not_mend_is_asked_once(serve, status):
    server = serve(reply({"error": "queries: \x1b[31mtoo long"}, status))
    text = give_up(server.url)
    assert f"HTTP {status}" in text and "too long" in text and "\x1b" not in text
    assert len(server.calls) == 1


@pytest.mark.parametrize("header", ["number", "date"])
def test_retry_after_is_honoured_and_bounded(serve, header):
    stamps = []

    def busy(handler, body):
        stamps.append(time.monotonic())
        if len(stamps) == 2:
            return answer(handler, body)
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
        handler.reply({}, 429, Retry_After="1" if header == "number" else date)

    ask(serve(busy).url, RetryPolicy(timeout=2, attempts=2, first_wait=0.01, longest_wait=3.0))
    assert 0.9 < stamps[1] - stamps[0] < 3.5
    assert retry_after("3600") == 3600
    assert retry_after("-5") == retry_after(None) == retry_after("x") == 0


def test_pauses_grow_and_jitter(serve):
    stamps, state = [], random.getstate()
    server = serve(lambda handler, body: (stamps.append(time.monotonic()), handler.reply({}, 500)))
    for _ in range(2):
        give_up(server.url, RetryPolicy(timeout=1, attempts=5, first_wait=0.05, longest_wait=0.3))
    first, second = np.diff(stamps[:5]), np.diff(stamps[5:])
    for pauses in (first, second):
        assert all(0.05 * 2**i <= pause for i, pause in enumerate(pauses[:3]))
        assert max(pauses) < 0.3 + SLACK
    assert not np.allclose(first[:2], second[:2], atol=1e-4)
    assert random.getstate() == state  # jitter takes no number from a draw that a run depends on
