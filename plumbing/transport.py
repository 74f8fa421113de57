"""One HTTP request, whole within a time limit whatever the server does.

httpx limits each read, not a whole request: asyncio's `timeout` does, from one event loop."""

import asyncio
import contextlib
import functools
import logging
import socket
import threading
import zlib
from concurrent.futures import Future
from typing import Any

import httpx

LONGEST_ANSWER = 32 * 2**20  # bytes


def fetch(url: str, timeout: float, request: dict[str, Any]) -> tuple[httpx.Response, bytes]:
    """A response and its whole body, or more than LONGEST_ANSWER bytes of it.

    timeout: seconds from looking the name up to the last byte; then TimeoutError is raised.
    request: arguments of httpx's `stream`. Redirects are not followed; no cookie is kept and no
    .netrc read. Raises httpx's errors, OSError, and ValueError for what can't be sent."""
    async def limited() -> tuple[httpx.Response, bytes]:
        async with asyncio.timeout(timeout):
            return await stream(url, request)

    with STARTING:
        future = asyncio.run_coroutine_threadsafe(limited(), event_loop())
    try:
        return future.result()
    finally:
        future.cancel()  # on a signal


async def stream(url: str, request: dict[str, Any]) -> tuple[httpx.Response, bytes]:
    options, body = {"method": "POST", "headers": {}} | request, bytearray()
    options["headers"] = {"Accept-Encoding": "gzip"} | options["headers"]
    async with (httpx.AsyncClient(verify=tls_context(), timeout=None) as client,
                client.stream(url=url, **options) as response,
                contextlib.aclosing(response.aiter_raw()) as parts):
        async for part in parts:
            body += part
            if len(body) > LONGEST_ANSWER:
                return response, bytes(body)
            await asyncio.sleep(0)  # a flood of tiny chunks must not hold up the clock
    return response, decompress(response.headers.get("Content-Encoding", ""), bytes(body))


def decompress(encoding: str, body: bytes) -> bytes:
    """A body without its gzip, of which at most LONGEST_ANSWER + 1 bytes are unpacked."""
    if encoding.strip().lower() in ("", "identity"):
        return body
    decoder = zlib.decompressobj(wbits=31)  # gzip
    try:
        plain = decoder.decompress(body, LONGEST_ANSWER + 1)
    except zlib.error:
        raise httpx.ReadError("not gzip") from None
    if not decoder.eof and len(plain) <= LONGEST_ANSWER:
        raise httpx.ReadError("gzip that is cut")
    return plain


tls_context = functools.cache(httpx.create_ssl_context)  # reading the certificates takes long


class EventLoop(asyncio.SelectorEventLoop):
    """Looks names up in daemon threads: a resolver that hangs holds up no other request, and not
    the end of the process."""

    async def getaddrinfo(self, *args: Any, **options: Any) -> Any:
        found = Future()
        found.set_running_or_notify_cancel()

        def look_up() -> None:
            try:
                found.set_result(socket.getaddrinfo(*args, **options))
            except (OSError, ValueError) as error:
                found.set_exception(error)

        threading.Thread(target=look_up, daemon=True).start()
        return await asyncio.wrap_future(found)


STARTING = threading.Lock()


@functools.cache
def event_loop() -> EventLoop:
    """The loop of all requests, in a thread of its own."""
    for name in ("httpx", "httpcore"):  # they log addresses, with the keys in them
        logging.getLogger(name).setLevel(logging.WARNING)
    loop = EventLoop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
