"""A web server in a thread that serves a folder, and fails as it is told to."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    """`answers` holds failures for the next requests, used from the front: a status, "cut" or "stall"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: list[int | str] = []
        self.has_ranges = True
        self.whole: Counter[str] = Counter()
        """number of bytes sent of each file, in units of its size"""
        self.requests: list[tuple[str, str]] = []
        self.page: str | None = None
        self.delay = 0.0
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """A client that was killed or gave up is no error."""

        self._server = Server(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_address[1]
        os.register_at_fork(after_in_child=self._server.socket.close)  # else it would accept after `stop`
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        time.sleep(self.delay)
        if self._server is None:  # a connection that was kept open
            handler.close_connection = True
            return
        path = self.folder / handler.path.partition("?")[0].lstrip("/")
        failure = self.answers.pop(0) if self.answers else None
        span = handler.headers.get("Range") or ""
        self.requests.append((path.name, span))
        if failure == "stall":
            time.sleep(30)
        if isinstance(failure, int) or not path.is_file():
            status = failure if isinstance(failure, int) else 404
            handler.send_response(status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if self.page is not None:
            self._send(handler, 200, self.page.encode(), {"Content-Type": "text/html"}, failure)
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{path.stat().st_mtime_ns}"', "Content-Type": "application/x-tar"}
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
        if bounds and self.has_ranges:
            start, end = int(bounds[1]), min(len(data), int(bounds[2]) + 1)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            self.whole[path.name] += (end - start) / len(data)
            self._send(handler, 206, data[start:end], headers, failure)
        else:
            self.whole[path.name] += 1
            self._send(handler, 200, data, headers, failure)

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], failure: object
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        try:
            handler.wfile.write(data[: len(data) // 2] if failure == "cut" else data)
            handler.wfile.flush()
        except OSError:
            return
        if failure == "cut":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    server = ShardServer(folder)
    try:
        yield server
    finally:
        if server._server is not None:
            server.stop()
