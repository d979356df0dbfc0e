"""HTTP requests with one deadline for everything that they consist of.

httpx's timeouts hold for each read from a socket.  A server that sends its status line, its headers, 1xx responses
or its body a byte at a time would never reach them.  Here every operation on a connection gets what is left of the
request's time:

    client = httpx.Client(transport=DeadlineTransport(max_connections=8))
    with limit_time(60.0), client.stream("POST", url, json=body) as response: ...

A deadline belongs to the thread that makes the request.  Proxies are taken from the environment, as by httpx.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore
import httpx

# Seconds after which an idle connection is closed.  Steps are further apart, and routers drop connections silently.
KEEP_ALIVE = 5.0

_thread = threading.local()


@contextlib.contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """In this context the thread's requests must be complete within so many seconds; else httpx.ReadTimeout."""
    _thread.deadline = time.monotonic() + seconds
    try:
        yield
    finally:
        _thread.deadline = None


def _cut(timeout: float | None, error: type[Exception]) -> float | None:
    """The smaller of a timeout and the time that is left; raises `error` if none is."""
    deadline = getattr(_thread, "deadline", None)
    if deadline is None:
        return timeout
    left = deadline - time.monotonic()
    if left <= 0:
        raise error("the request's time is over")
    return left if timeout is None else min(timeout, left)


class _Stream(httpcore.NetworkStream):
    """A connection whose operations end at the deadline of the thread that uses it."""

    def __init__(self, stream: httpcore.NetworkStream):
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _cut(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _cut(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        timeout = _cut(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """Opens connections that keep deadlines."""

    def __init__(self) -> None:
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        timeout = _cut(timeout, httpcore.ConnectTimeout)
        return _Stream(self._backend.connect_tcp(host, port, timeout, local_address, socket_options))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _Body(httpx.SyncByteStream):
    """A response's body, whose errors are httpx's."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx_errors():
            yield from self._stream

    def close(self) -> None:
        if hasattr(self._stream, "close"):
            self._stream.close()


class DeadlineTransport(httpx.BaseTransport):
    """Transport of httpx.Client for one server."""

    def __init__(self, address: str, max_connections: int):
        """address: the server's, which decides if a proxy of the environment is used."""
        url = httpx.URL(address)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        options: dict[str, Any] = dict(
            ssl_context=httpx.create_ssl_context(),
            max_connections=max_connections,
            keepalive_expiry=KEEP_ALIVE,
            network_backend=_Backend(),
        )
        self._pool: httpcore.ConnectionPool
        if proxy and not urllib.request.proxy_bypass(url.host):
            if "://" not in proxy:
                proxy = f"http://{proxy}"
            if not proxy.startswith(("http://", "https://")):
                raise ValueError("the proxy that the environment names is none of http:// or https://")
            chosen = httpx.Proxy(proxy)
            self._pool = httpcore.HTTPProxy(
                proxy_url=str(chosen.url),
                proxy_auth=chosen.raw_auth,
                proxy_headers=chosen.headers.raw,
                **options,
            )
        else:
            self._pool = httpcore.ConnectionPool(**options)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; returns when the headers of the response are there."""
        assert isinstance(request.stream, httpx.SyncByteStream)
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        sent = httpcore.Request(
            method=request.method,
            url=url,
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx_errors():
            received = self._pool.handle_request(sent)
        return httpx.Response(
            status_code=received.status,
            headers=received.headers,
            stream=_Body(received.stream),
            extensions=received.extensions,
        )

    def close(self) -> None:
        self._pool.close()


@contextlib.contextmanager
def _as_httpx_errors() -> Iterator[None]:
    """Convert httpcore's errors to those that callers of httpx expect."""
    try:
        yield
    except httpcore.TimeoutException as error:
        raise httpx.ReadTimeout(str(error)) from error
    except (
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.ProxyError,
        httpcore.UnsupportedProtocol,
    ) as error:
        raise httpx.ConnectError(str(error)) from error
