"""A proxy between a client and an emulated object store that lets some of its requests fail.

Which of them do is drawn from a seed and the number of the request. A real store discards an upload
that is cut, which the emulators keep as far as it came: such a request is not forwarded at all.
Google's emulator ignores `ifGenerationMatch`; here the proxy keeps it, one upload with a condition
at a time.
"""

import collections
import contextlib
import http.client
import http.server
import json
import random
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator

REFUSED = ("429", "500", "503")
"""Answered so, and not forwarded."""
UNANSWERED = ("late 503", "closed after", "cut")
"""Forwarded and heard; what is answered is 503, nothing, or half the answer at its full length."""
KINDS = (*REFUSED, *UNANSWERED, "closed", "half", "slow")
"""Those, and: the line is closed at once; after half of what is sent; all is answered, but late."""

_OF_ONE_LINE = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@contextlib.contextmanager
def proxy(
    upstream: str,
    *,
    seed: int = 0,
    rate: float = 0.0,
    kinds: tuple[str, ...] = KINDS,
    delay: float = 0.2,
) -> Iterator[tuple[str, collections.Counter]]:
    """Serve what an emulator serves; yield the URL, and how many requests met with which fault.

    Args:
        upstream: the emulator's URL.
        seed: of the faults.
        rate: the probability that a request meets with one.
        kinds: those of `KINDS` that may be.
        delay: seconds of what is slow.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"`kinds` must be of {KINDS}; got {sorted(unknown)}.")
    server = _Server(upstream, seed, rate, kinds, delay)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server.counts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_MEDIA = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/?]+)\?(.*alt=media.*)")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, upstream, seed, rate, kinds, delay):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.seed, self.rate, self.kinds, self.delay = seed, rate, kinds, delay
        self.counts = collections.Counter()
        self.conditional = {}  # by upload_id: the condition, and the path of the object
        self.one_at_a_time = threading.Lock()
        self._lock = threading.Lock()

    def draw(self) -> str | None:
        """Return the fault of the next request, None where it has none."""
        with self._lock:
            self.counts["requests"] += 1
            drawn = random.Random(f"{self.seed} {self.counts['requests']}")
            kind = drawn.choice(self.kinds) if drawn.random() < self.rate else None
            self.counts[kind or "sound"] += 1
        return kind

    def forwarded(self) -> None:
        with self._lock:
            self.counts["forwarded"] += 1

    def handle_error(self, request, client_address):
        """Say nothing of clients that went away."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_):
        """Log nothing."""

    def _handle(self):
        kind = self.server.draw()
        if kind in ("closed", "half"):
            sent = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(sent // 2 if kind == "half" else 0)
            self._close()
            return
        body = self._body()
        if kind in REFUSED:
            self._refuse(int(kind))
            return
        if kind == "slow":
            time.sleep(self.server.delay)
        answer = self._forward(body)
        self.server.forwarded()
        if kind == "late 503":
            self._refuse(503)
        elif kind == "closed after":
            self._close()
        else:
            self._answer(*answer, cut=kind == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes):
        condition = self._condition(body)
        if condition is None and _MEDIA.fullmatch(self.path):
            return self._read(body)
        if condition is None:
            return self._ask(self.command, self.path, self._headers(body), body)
        wanted, place = condition
        with self.server.one_at_a_time:
            status, _, found = self._ask("GET", place, [], b"")
            there = json.loads(found).get("generation", "?") if status == 200 else "0"
            if there != wanted:
                said = {"error": {"code": 412, "message": "conditionNotMet"}}
                return 412, [("Content-Type", "application/json")], json.dumps(said).encode()
            status, headers, answer = self._ask(self.command, self.path, self._headers(body), body)
        for name, value in headers:  # of an upload in parts, which the last of them ends
            if name.lower() == "location" and "upload_id=" in value:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(value).query)
                self.server.conditional[query["upload_id"][0]] = condition
        return status, headers, answer

    def _read(self, body: bytes):
        """Tell the generation of what is read: tensorstore wants it, the emulator omits it."""
        bucket, name, query = _MEDIA.fullmatch(self.path).groups()
        with self.server.one_at_a_time:
            answer = self._ask(self.command, self.path, self._headers(body), body)
            about = self._ask("GET", f"/storage/v1/b/{bucket}/o/{name}", [], b"")
        if answer[0] not in (200, 206) or about[0] != 200:
            return answer
        generation = json.loads(about[2])["generation"]
        if urllib.parse.parse_qs(query).get("ifGenerationNotMatch") == [generation]:
            return 304, [], b""
        return answer[0], [*answer[1], ("X-Goog-Generation", generation)], answer[2]

    def _condition(self, body: bytes) -> tuple[str, str] | None:
        """Return the generation that an upload asks for, 0 for none, and the object's path."""
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        begun = query.get("upload_id", [""])[0]
        if begun in self.server.conditional:
            return self.server.conditional[begun]
        bucket = re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path)
        if bucket is None or self.command != "POST" or "ifGenerationMatch" not in query:
            return None
        name = query.get("name", [""])[0]
        if not name:  # a JSON object is the first part
            start = body.index(b"{")
            name = json.JSONDecoder().raw_decode(body[start:].decode("utf-8", "replace"))[0]["name"]
        place = f"/storage/v1/b/{bucket[1]}/o/{urllib.parse.quote(name, safe='')}"
        return query["ifGenerationMatch"][0], place

    def _headers(self, body: bytes) -> list[tuple[str, str]]:
        kept = [(k, v) for k, v in self.headers.items() if k.lower() not in _OF_ONE_LINE]
        sends = body or self.command in ("POST", "PUT", "PATCH")
        return [*kept, ("Content-Length", str(len(body)))] if sends else kept

    def _ask(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes):
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            own_host = any(
                name.lower() == "host" for name, _ in headers
            )  # addresses lead back here
            upstream.putrequest(method, path, skip_host=own_host, skip_accept_encoding=True)
            for name, value in headers:
                upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _answer(self, status, headers, answer: bytes, *, cut: bool) -> None:
        self.send_response_only(status)
        length = str(len(answer))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in _OF_ONE_LINE:
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        if cut:
            self.wfile.write(answer[: len(answer) // 2])
            self._close()
        elif self.command != "HEAD":
            self.wfile.write(answer)

    def _refuse(self, status: int) -> None:
        said = {429: "rateLimitExceeded", 500: "backendError", 503: "backendError"}[status]
        kind = "application/json"
        text = json.dumps({"error": {"code": status, "message": said}})
        if "AWS" in self.headers.get("Authorization", ""):
            code = {429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}[status]
            kind, text = "application/xml", f"<Error><Code>{code}</Code></Error>"
        self._answer(status, [("Content-Type", kind)], text.encode(), cut=False)

    def _close(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
