"""Requests to servers, bounded in time and attempts; error messages never hold a secret.

tenacity does the retrying; a server's replicas stand in for each other."""

import contextlib
import itertools
import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import tenacity

from plumbing.cli import UserError, console
from plumbing.text import clean
from plumbing.transport import LONGEST_ANSWER, fetch

JITTER = random.Random()  # separate, so that pauses don't change any other draw


class OutsideError(UserError):
    """A server gave no usable answer, and the attempts are used up or another would not help."""


class TransientError(OutsideError):
    """A failure worth another attempt. retry_after: the pause that the server asks for, seconds.
    down: the server itself is at fault, whatever it is asked."""

    def __init__(self, text: str, retry_after: float = 0.0, down: bool = False):
        super().__init__(text)
        self.retry_after, self.down = retry_after, down


@dataclass(frozen=True)
class RetryPolicy:
    """Timeout, attempts and pauses of a call, in seconds. `bound`: the most that it waits.

    The pause after attempt n is max(first_wait x 2^(n - 1), Retry-After) plus a jitter of up to
    first_wait, and at most longest_wait."""

    timeout: float = 20.0  # of an attempt: from looking the name up to the answer's last byte
    attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0

    @property
    def bound(self) -> float:
        return self.attempts * self.timeout + (self.attempts - 1) * self.longest_wait


class Replicas:
    """Base URLs of equal servers, which take turns. One that is down is set aside for a while:
    `pause` seconds, twice as long each time, at most LONGEST_PAUSE. All are asked if all are down.

    check: function(url, seconds) that raises OutsideError unless a server is back."""

    LONGEST_PAUSE = 960.0

    def __init__(self, urls: list[str], check: Callable[[str, float], Any] = lambda *_: None,
                 pause: float = 60.0):
        self.urls, self.check, self.pause = urls, check, pause
        self._turn, self._lock = itertools.count(), threading.Lock()
        self._until: dict[str, float] = {}  # of those set aside
        self._pauses: dict[str, float] = {}  # the last one of those that have not answered since

    def pick(self, timeout: float) -> str:
        """The next URL. Takes up to half of `timeout`, to check one that was set aside."""
        start = next(self._turn) % len(self.urls)
        order = self.urls[start:] + self.urls[:start]
        if due := self._due(order):
            with contextlib.suppress(OutsideError):
                self.check(due, min(10.0, timeout / 2))
                self._until.pop(due)
                console.print(f"{due}: answers again", style="yellow", soft_wrap=True)
                return due
        return next((url for url in order if url not in self._until), order[0])

    def _due(self, urls: list[str]) -> str | None:
        """One whose pause is over. It begins another one, so that only one thread checks it."""
        now = time.monotonic()
        with self._lock:
            for url in urls:
                if self._until.get(url, now) < now:
                    self._until[url] = now + self._longer(url)
                    return url
        return None

    def set_aside(self, url: str, reason: Exception) -> None:
        with self._lock:
            if len(self.urls) == 1 or url in self._until:
                return
            pause = self._longer(url)
            self._until[url] = time.monotonic() + pause
        console.print(f"{reason}: this replica is set aside for {pause:g} s", style="yellow",
                      soft_wrap=True)

    def _longer(self, url: str) -> float:
        pause = min(2 * self._pauses.get(url, self.pause / 2), self.LONGEST_PAUSE)
        self._pauses[url] = pause
        return pause

    def answered(self, url: str) -> None:
        self._pauses.pop(url, None)


def call(urls: list[str] | Replicas, parse: Callable[[Any], Any], *, retry_policy: RetryPolicy,
         path: str = "", secret: str = "", **request: Any) -> Any:
    """`parse` of a server's JSON answer. Every request of the kit to a server is made here.

    Retried: no connection, a timeout, an incomplete answer, one that `parse` can't read, HTTP 408,
    429 and 5xx. Each attempt goes to the next of `urls`, at `path`. request: arguments of httpx's
    `stream`. Raises OutsideError, from whose text the secret is removed."""
    replicas = urls if isinstance(urls, Replicas) else Replicas(urls)

    def pause(state: tenacity.RetryCallState) -> float:
        backoff = retry_policy.first_wait * 2 ** (state.attempt_number - 1)
        backoff = max(state.outcome.exception().retry_after, backoff)
        jitter = JITTER.uniform(0, retry_policy.first_wait)
        return min(retry_policy.longest_wait, backoff + jitter)

    def attempt() -> Any:
        deadline = time.monotonic() + retry_policy.timeout
        url = replicas.pick(retry_policy.timeout)
        try:
            seconds = max(0.0, deadline - time.monotonic())
            answer = call_once(url + path, parse, seconds, secret, request)
        except TransientError as error:
            if error.down and replicas is urls:  # there will be other calls
                replicas.set_aside(url, error)
            raise
        replicas.answered(url)
        return answer

    retry = tenacity.retry_if_exception_type(TransientError)
    stop = tenacity.stop_after_attempt(retry_policy.attempts)
    try:
        return tenacity.Retrying(retry=retry, stop=stop, wait=pause, reraise=True)(attempt)
    except TransientError as error:
        raise OutsideError(f"{error}; given up after {retry_policy.attempts} attempts") from None


def call_once(url: str, parse: Callable[[Any], Any], timeout: float, secret: str,
              request: dict[str, Any]) -> Any:
    name = clean(url)
    try:
        response, body = fetch(url, timeout, request)
    except TimeoutError:
        text = f"{name}: no whole answer within {round(timeout, 1):g} s"
        raise TransientError(text, down=True) from None
    except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL,
            ValueError) as error:
        raise OutsideError(f"{name}: no valid request ({type(error).__name__})") from None
    except (httpx.TransportError, OSError) as error:
        text = f"{name}: the connection failed ({type(error).__name__})"
        raise TransientError(text, down=True) from None
    status = response.status_code
    if status in (408, 429) or status >= 500:
        pause = retry_after(response.headers.get("Retry-After"))
        raise TransientError(f"{name}: HTTP {status}", pause, down=status >= 500)
    if status != 200:
        text = body.decode("utf-8", "replace")
        text = text.replace(secret, "***") if secret else text
        raise OutsideError(f"{name}: HTTP {status} {clean(text, 300)}")
    if len(body) > LONGEST_ANSWER:
        raise OutsideError(f"{name}: an answer of more than {LONGEST_ANSWER:,} bytes")
    try:
        return parse(json.loads(body.decode("utf-8-sig", "replace")))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise TransientError(f"{name}: an answer of another form than expected") from None


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header, a number or a date, asks for; 0 if absent or invalid."""
    for read in (float, lambda text: parsedate_to_datetime(text).timestamp() - time.time()):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return max(0.0, read(header))
    return 0.0


def in_threads(function: Callable[[Any], Any], items: list[Any], workers: int) -> list[Any]:
    """The function's value for every item, in order, with at most `workers` threads.

    Whatever they wait for, a signal ends this call at once, and the process can end: that is why
    they are no ThreadPoolExecutor's, which are joined in both cases."""
    futures: list[Future] = [Future() for _ in items]
    waiting = deque(zip(futures, items))

    def work() -> None:
        with contextlib.suppress(IndexError):  # none is waiting
            while True:
                future, item = waiting.popleft()
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        return [future.result() for future in futures]
    finally:
        waiting.clear()


def is_server(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def server_urls(name: str) -> list[str]:
    """Base URLs of a server's replicas, such as http://host:8000/v1, separated by commas."""
    return [url.strip().rstrip("/") for url in name.split(",") if url.strip()]


def openai_key() -> dict[str, Any]:
    """OPENAI_API_KEY from the environment as arguments of `call`; {} without one."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return {"secret": key, "headers": {"Authorization": f"Bearer {key}"}} if key else {}


CARD_POLICY = RetryPolicy(timeout=10, attempts=3)


def served_model(name: str, retry_policy: RetryPolicy = CARD_POLICY) -> dict[str, Any]:
    """`id` and `root` of a server's first model, from any of its replicas. root: the name or folder
    that vLLM or sglang loaded it from, else None."""
    def first(answer: dict[str, Any]) -> dict[str, Any]:
        card = answer["data"][0]
        if not is_name(card["id"]) or not is_name(card.get("root") or "-"):
            raise ValueError
        return {"id": card["id"], "root": card.get("root") or None}

    urls = server_urls(name)
    policy = replace(retry_policy, attempts=retry_policy.attempts + len(urls) - 1)
    return call(urls, first, path="/models", retry_policy=policy, method="GET", **openai_key())


def is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 1000 and value.isprintable()


def served_replicas(urls: list[str]) -> tuple[Replicas, str]:
    """The replicas of a served model, and its id. Those that don't answer are set aside. Raises
    OutsideError if none answers, UserError if they serve different models."""
    def card(url: str) -> str | OutsideError:
        try:
            return served_model(url)["id"]
        except OutsideError as error:
            return error

    def check(url: str, timeout: float) -> None:
        if served_model(url, RetryPolicy(timeout, attempts=1))["id"] != model:
            raise OutsideError(f"{url} serves another model than {model}")

    cards = dict(zip(urls, in_threads(card, urls, 64)))
    served = {url: found for url, found in cards.items() if isinstance(found, str)}
    if not served:
        raise cards[urls[0]]
    if len(set(served.values())) > 1:
        raise UserError(f"the replicas serve different models: {served}")
    replicas, model = Replicas(urls, check), next(iter(served.values()))
    for url in cards.keys() - served.keys():
        replicas.set_aside(url, cards[url])
    return replicas, model
