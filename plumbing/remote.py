"""One way to ask a server: bounded in time and attempts, with growing pauses, and errors that hold no secret.

tenacity does the retrying; urllib3's own Retry has no deadline for a whole answer, and requests has none at all."""

import contextlib
import email.utils
import itertools
import json
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests
import tenacity
import urllib3

from plumbing.cli import UserError
from plumbing.text import clean


class OutsideError(UserError):
    """A server gave no usable answer, and asking again would not help or has been tried often enough."""


class Stumble(OutsideError):
    """A failure that may pass. `retry_after`: seconds the server asks to be left alone."""

    def __init__(self, text: str, retry_after: float = 0.0):
        super().__init__(text)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server, in seconds; `bound` is the longest a call can take in all.

    Before attempt n + 1 comes a pause of first_wait x 2^(n - 1), or of what Retry-After asks if that is more, plus up to
    first_wait of jitter, and never more than longest_wait."""

    timeout: float = 20.0  # to connect, to begin an answer, to end it
    attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0

    @property
    def bound(self) -> float:
        return self.attempts * 2 * self.timeout + (self.attempts - 1) * self.longest_wait


JITTER = random.Random()  # of its own: pauses leave every other draw alone


LONGEST_ANSWER = 32 * 2**20  # bytes


def call(urls: list[str], parse: Callable[[Any], Any], *, patience: Patience, secret: str = "", **request: Any) -> Any:
    """Ask a server for JSON and return what `parse` makes of it. All calls of the kit to the outside go through here.

    Tried again: no connection, no answer in time, half an answer, one that `parse` can't read, HTTP 408, 429 and 5xx. With
    several urls, replicas, each attempt goes to the next. `request` is what requests.request takes. Raises OutsideError;
    its text never holds the secret."""
    number = itertools.count()

    def pause(state: tenacity.RetryCallState) -> float:
        backoff = max(state.outcome.exception().retry_after, patience.first_wait * 2 ** (state.attempt_number - 1))
        return min(patience.longest_wait, backoff + JITTER.uniform(0, patience.first_wait))

    retry, stop = tenacity.retry_if_exception_type(Stumble), tenacity.stop_after_attempt(patience.attempts)
    try:
        return tenacity.Retrying(retry=retry, stop=stop, wait=pause, reraise=True)(
            lambda: call_once(urls[next(number) % len(urls)], parse, patience.timeout, secret, request))  # fmt: skip
    except Stumble as error:
        raise OutsideError(f"{error}; given up after {patience.attempts} attempts") from None


def call_once(url: str, parse: Callable[[Any], Any], timeout: float, secret: str, request: dict[str, Any]) -> Any:
    try:
        response, body = fetch(url, timeout, request)
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise Stumble(f"{url}: no whole answer within {timeout:g} s") from None
    except (requests.ConnectionError, urllib3.exceptions.HTTPError) as error:
        raise Stumble(f"{url}: the connection failed ({type(error).__name__})") from None
    except requests.RequestException as error:
        raise OutsideError(f"{url}: {type(error).__name__}") from None
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise Stumble(f"{url}: HTTP {response.status_code}", retry_after(response.headers.get("Retry-After")))
    if response.status_code != 200:
        text = body.decode("utf-8", "replace")
        text = text.replace(secret, "***") if secret else text
        raise OutsideError(f"{url}: HTTP {response.status_code} {clean(text, 300)}")
    try:
        return parse(json.loads(body.decode("utf-8", "replace")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Stumble(f"{url}: an answer of another form than expected") from None


def fetch(url: str, timeout: float, request: dict[str, Any]) -> tuple[requests.Response, bytes]:
    """A response and its whole body. Read piece by piece: a server that drips could otherwise hold us for ever."""
    deadline, body = time.monotonic() + timeout, b""
    options = {"method": "POST", "timeout": timeout, "stream": True, "allow_redirects": False} | request
    with requests.request(url=url, **options) as response:
        while part := response.raw.read1(2**16, decode_content=True):
            body += part
            if time.monotonic() > deadline or len(body) > LONGEST_ANSWER:
                raise requests.Timeout
    return response, body


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 for none and for nonsense."""
    for read in (float, lambda text: email.utils.parsedate_to_datetime(text).timestamp() - time.time()):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return max(0.0, read(header))
    return 0.0


def in_threads(function: Callable[[Any], Any], items: list[Any], workers: int) -> list[Any]:
    """The function of every item, in order, at most `workers` at a time."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(workers, len(items))) as pool:
        return list(pool.map(function, items))


def is_server(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def server_urls(name: str) -> list[str]:
    """Base addresses, such as http://host:8000/v1, of a server's replicas: comma separated."""
    return [url.strip().rstrip("/") for url in name.split(",") if url.strip()]


def openai_key() -> dict[str, Any]:
    """The key of an OpenAI-compatible server, if there is one in the environment, as arguments of `call`."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return {"secret": key, "headers": {"Authorization": f"Bearer {key}"}} if key else {}


def served_model(url: str) -> dict[str, Any]:
    """The entry of /models: its id, and with vLLM and sglang as `root` the name or folder it was loaded from."""

    def first(answer: dict[str, Any]) -> dict[str, Any]:
        return {name: answer["data"][0].get(name) for name in ("id", "root")}

    return call([f"{url}/models"], first, patience=Patience(timeout=10, attempts=3), method="GET", **openai_key())


def chat_verdicts(address: str, model: str | None, questions: list[tuple[str, str]], words: tuple[str, ...],
                  patience: Patience = Patience(timeout=120)) -> list[str | None]:  # fmt: skip
    """The one of `words` that a served model replies to each (system, user); None for none, or several.

    model: by default the first that the server offers. Raises OutsideError if it fails for good."""
    urls = server_urls(address)
    model = model or served_model(urls[0])["id"]

    def verdict(answer: dict[str, Any]) -> str | None:
        found = set(re.findall("|".join(words), answer["choices"][0]["message"]["content"].lower()))
        return found.pop() if len(found) == 1 else None

    def ask(question: tuple[str, str]) -> str | None:
        messages = [{"role": role, "content": text} for role, text in zip(("system", "user"), question)]
        body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 16}
        return call([f"{url}/chat/completions" for url in urls], verdict, patience=patience, json=body, **openai_key())

    return in_threads(ask, questions, 16)
