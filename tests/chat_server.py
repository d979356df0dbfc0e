"""A chat server on 127.0.0.1 that answers by a script."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable


class Server:
    """Answers what `script(n, body)` returns: status, headers, body; n counts the requests."""

    def __init__(self, script: Callable, port: int = 0):
        self.requests, self.open, self.most_open, self.lock = [], 0, 0, threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    n = len(outer.requests)
                    outer.requests.append((self.path, dict(self.headers), body))
                    outer.open += 1
                    outer.most_open = max(outer.most_open, outer.open)
                try:
                    status, headers, content = script(n, body)
                finally:
                    with outer.lock:
                        outer.open -= 1
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client has gone: it was told to wait too long, or was killed
                    pass

            def log_message(self, *_):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, request, address):  # a client that was killed
                pass

        self.server = Quiet(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self.thread.start()

    @property
    def bodies(self) -> list[dict]:
        return [body for _, _, body in self.requests]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def reply(text: str, finish: str = "stop", tokens: int = 3) -> tuple[int, dict, bytes]:
    """A chat completion."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}).encode()
