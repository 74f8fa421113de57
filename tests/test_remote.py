"""One call to a server that fails, stalls or hangs up: each ends, in its bound."""

import random
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from plumbing import remote
from plumbing.remote import (OutsideError, Replicas, RetryPolicy, call, in_threads,
                             retry_after)

QUICK = RetryPolicy(timeout=5, attempts=3, first_wait=0.02, longest_wait=0.2)
IMPATIENT = replace(QUICK, timeout=0.4)  # for a server that doesn't answer


def ask(url, retry_policy=QUICK):
    """The documents that the server, or one of Replicas, finds."""
    urls = url if isinstance(url, Replicas) else [url]
    return call(urls, lambda answer: answer["documents"], retry_policy=retry_policy,
                json={"query": "Peru"})


def give_up(url, retry_policy=QUICK):
    """What the error says, in the bound; a busy machine may add a little."""
    begun = time.monotonic()
    with pytest.raises(OutsideError) as error:
        ask(url, retry_policy)
    assert time.monotonic() - begun < retry_policy.bound + 5
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
    text = give_up(server.url, IMPATIENT if "within" in words else QUICK)
    assert words in text and "given up after 3 attempts" in text
    assert len(server.calls) == 3 or "within" in words  # a busy server may be late to see one


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing_but_time(serve, fault):
    server = serve(lambda handler, body: (FAULTS[fault][0] if len(server.calls) == 1 else answer)(
        handler, body))
    policy = replace(QUICK, timeout=1.5) if "within" in FAULTS[fault][1] else QUICK
    assert ask(server.url, policy) == ["about Peru"] and len(server.calls) == 2


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


@pytest.fixture
def pauses(monkeypatch):
    """The seconds of each pause, none of which is taken."""
    taken = []
    monkeypatch.setattr("tenacity.nap.time.sleep", taken.append)
    return taken


@pytest.mark.parametrize("header,low,high", [("1", 1, 1.01), ("date", 2, 4.01), ("3600", 9, 9)])
def test_retry_after_is_honoured_and_bounded(serve, pauses, header, low, high):
    def busy(handler, body):
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 4))
        handler.reply({}, 429, Retry_After=date if header == "date" else header)

    policy = RetryPolicy(timeout=5, attempts=2, first_wait=0.01, longest_wait=9)
    give_up(serve(busy).url, policy)
    (pause,) = pauses
    assert low <= pause <= high
    assert retry_after("3600") == 3600
    assert retry_after("-5") == retry_after(None) == retry_after("x") == 0


def test_pauses_grow_and_jitter(serve, pauses):
    state, server = random.getstate(), serve(reply({}, 500))
    for _ in range(2):
        give_up(server.url, RetryPolicy(timeout=5, attempts=5, first_wait=0.05, longest_wait=0.3))
    first, second = pauses[:4], pauses[4:]
    for row in (first, second):
        assert all(0.05 * 2**i <= pause <= 0.05 * (2**i + 1) for i, pause in enumerate(row[:3]))
        assert row[3] == 0.3
    assert first[:3] != second[:3]
    assert random.getstate() == state  # jitter takes no number from a draw that a run depends on


# ---------------------------------------------------------------- names, replicas


def test_a_resolver_that_hangs_is_bounded_and_leaves_no_thread(monkeypatch):
    free, before = threading.Event(), threading.active_count()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: free.wait(20) and [])
    assert "no whole answer within 0.4 s" in give_up("http://slow.example/", IMPATIENT)
    free.set()
    deadline = time.monotonic() + 10
    while threading.active_count() > before + 1 and time.monotonic() < deadline:  # the event loop
        time.sleep(0.01)
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a:99999", "http://" + "a" * 70,
                                 "http://\u0130\ud800", "ftp://a", "http://a\n.b"], ids=repr)
def test_an_address_that_is_none_is_one_error(url):
    assert "\n" not in give_up(url)


def replicas_of(servers, **options):
    return Replicas([server.url for server in servers], **options)


def test_a_replica_that_hangs_costs_one_timeout_and_is_said_once(serve, capsys, monkeypatch):
    sound, hung, checks, later = serve(answer), serve(hang), [], 0.0
    clock = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + later)
    monkeypatch.setattr(remote, "time", clock)

    def check(url, timeout):
        checks.append(url)
        if hung.behave is hang:
            raise OutsideError("not yet")

    replicas = replicas_of([hung, sound], check=check)

    def batch():
        """How often the replica that hangs was asked."""
        before = len(hung.calls)
        in_threads(lambda _: ask(replicas, replace(QUICK, timeout=1.5)), list(range(4)), 4)
        return len(hung.calls) - before

    assert 1 <= batch() <= 2 and batch() == 0 and not checks
    later = 61.0
    assert batch() == 0 and checks == [hung.url]  # by one thread, and it is no better
    later, hung.behave = 61.0 + 119.0, answer
    assert batch() == 0 and len(checks) == 1  # aside for twice as long
    later = 61.0 + 121.0
    assert batch() + batch() >= 2 and len(checks) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "set aside for 60 s" in said[0] and "answers again" in said[1]


def test_if_all_replicas_are_down_it_is_an_error_and_they_are_still_asked(serve):
    servers = [serve(reply({}, 503)) for _ in range(2)]
    replicas = replicas_of(servers)
    for _ in range(2):
        assert "HTTP 503; given up after 3 attempts" in give_up(replicas)
    assert sum(len(server.calls) for server in servers) == 6
    servers[1].behave = answer
    assert ask(replicas) == ["about Peru"]


def test_a_netrc_is_not_read(serve, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password SECRET")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serve(answer)
    ask(server.url)
    assert "Authorization" not in server.calls[0][2]
