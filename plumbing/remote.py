"""Requests to servers, bounded in time and attempts; error messages never hold a secret.

tenacity does the retrying: urllib3's Retry has no total deadline, and requests has no limit on the
time that a whole answer takes, which `fetch` adds."""

import contextlib
import itertools
import json
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import requests
import tenacity
import urllib3

from plumbing.cli import UserError
from plumbing.text import clean

JITTER = random.Random()  # separate, so that pauses don't change any other draw
LONGEST_ANSWER = 32 * 2**20  # bytes


class OutsideError(UserError):
    """A server gave no usable answer, and the attempts are used up or another would not help."""


class TransientError(OutsideError):
    """A failure worth another attempt. retry_after: the pause that the server asks for, seconds."""

    def __init__(self, text: str, retry_after: float = 0.0):
        super().__init__(text)
        self.retry_after = retry_after


@dataclass(frozen=True)
class RetryPolicy:
    """Timeout, attempts and pauses of a call, in seconds. `bound`: the most that it takes.

    The pause after attempt n is max(first_wait x 2^(n - 1), Retry-After) plus a jitter of up to
    first_wait, and at most longest_wait."""

    timeout: float = 20.0  # to connect, to the first byte, and for the whole answer
    attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0

    @property
    def bound(self) -> float:
        return self.attempts * 2 * self.timeout + (self.attempts - 1) * self.longest_wait


def call(urls: list[str], parse: Callable[[Any], Any], *, retry_policy: RetryPolicy,
         secret: str = "", **request: Any) -> Any:
    """`parse` of a server's JSON answer. Every request of the kit to a server is made here.

    Retried: no connection, a timeout, an incomplete answer, one that `parse` can't read, HTTP 408,
    429 and 5xx. Each attempt goes to the next of `urls`, the replicas. request: arguments of
    requests.request. Raises OutsideError, from whose text the secret is removed."""
    number = itertools.count()

    def pause(state: tenacity.RetryCallState) -> float:
        backoff = retry_policy.first_wait * 2 ** (state.attempt_number - 1)
        backoff = max(state.outcome.exception().retry_after, backoff)
        jitter = JITTER.uniform(0, retry_policy.first_wait)
        return min(retry_policy.longest_wait, backoff + jitter)

    def attempt() -> Any:
        url = urls[next(number) % len(urls)]
        return call_once(url, parse, retry_policy.timeout, secret, request)

    retry = tenacity.retry_if_exception_type(TransientError)
    stop = tenacity.stop_after_attempt(retry_policy.attempts)
    try:
        return tenacity.Retrying(retry=retry, stop=stop, wait=pause, reraise=True)(attempt)
    except TransientError as error:
        raise OutsideError(f"{error}; given up after {retry_policy.attempts} attempts") from None


def call_once(url: str, parse: Callable[[Any], Any], timeout: float, secret: str,
              request: dict[str, Any]) -> Any:
    try:
        response, body = fetch(url, timeout, request)
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise TransientError(f"{url}: no whole answer within {timeout:g} s") from None
    except (requests.ConnectionError, urllib3.exceptions.HTTPError) as error:
        raise TransientError(f"{url}: the connection failed ({type(error).__name__})") from None
    except requests.RequestException as error:
        raise OutsideError(f"{url}: {type(error).__name__}") from None
    status = response.status_code
    if status in (408, 429) or status >= 500:
        pause = response.headers.get("Retry-After")
        raise TransientError(f"{url}: HTTP {status}", retry_after(pause))
    if status != 200:
        text = body.decode("utf-8", "replace")
        text = text.replace(secret, "***") if secret else text
        raise OutsideError(f"{url}: HTTP {status} {clean(text, 300)}")
    try:
        return parse(json.loads(body.decode("utf-8", "replace")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise TransientError(f"{url}: an answer of another form than expected") from None


def fetch(url: str, timeout: float, request: dict[str, Any]) -> tuple[requests.Response, bytes]:
    """A response and its whole body. It is read in chunks, to stop a server that sends slowly.
    Raises requests.Timeout after `timeout` seconds or LONGEST_ANSWER bytes."""
    deadline, body = time.monotonic() + timeout, b""
    options = {"method": "POST", "timeout": timeout, "stream": True, "allow_redirects": False}
    with requests.request(url=url, **options | request) as response:
        while part := response.raw.read1(2**16, decode_content=True):
            body += part
            if time.monotonic() > deadline or len(body) > LONGEST_ANSWER:
                raise requests.Timeout
    return response, body


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
    key = os.environ.get("OPENAI_API_KEY", "")
    return {"secret": key, "headers": {"Authorization": f"Bearer {key}"}} if key else {}


def served_model(url: str) -> dict[str, Any]:
    """`id` and `root` of the server's first model. root: the name or folder that vLLM or sglang
    loaded it from, else None."""
    def first(answer: dict[str, Any]) -> dict[str, Any]:
        return {name: answer["data"][0].get(name) for name in ("id", "root")}

    policy = RetryPolicy(timeout=10, attempts=3)
    return call([f"{url}/models"], first, retry_policy=policy, method="GET", **openai_key())


def chat_verdicts(address: str, model: str | None, questions: list[tuple[str, str]],
                  words: tuple[str, ...]) -> list[str | None]:
    """The one of `words` in a served model's reply to each (system, user) pair; None if it has
    none or several. model: None for the server's first. Raises OutsideError."""
    urls = server_urls(address)
    model = model or served_model(urls[0])["id"]
    urls = [f"{url}/chat/completions" for url in urls]

    def verdict(answer: dict[str, Any]) -> str | None:
        reply = answer["choices"][0]["message"]["content"]
        found = set(re.findall("|".join(words), reply.lower()))
        return found.pop() if len(found) == 1 else None

    def ask(question: tuple[str, str]) -> str | None:
        messages = [{"role": role, "content": text}
                    for role, text in zip(("system", "user"), question)]
        body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 16}
        policy = RetryPolicy(timeout=120)
        return call(urls, verdict, retry_policy=policy, json=body, **openai_key())

    return in_threads(ask, questions, 16)
