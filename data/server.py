"""HTTP: requests read within limits, checked, and handed to a data.service.Service.

One request a connection, a thread each; the model runs in the Scheduler's thread. Standard library
alone: http.server reads the request line and headers, the limits are here.
"""
import contextlib
import hmac
import http.server
import io
import json
import re
import select
import socket
import sys
import threading
import time
import urllib.parse

from data.answer import ApiError
from data.api import parse_body
from data.scheduler import Busy

MAX_HEADER = 1 << 16  # bytes
MAX_BODY = 1 << 20
TOO_LONG = f"the body is longer than {MAX_BODY:,} bytes"
MAX_CONNECTIONS = 64
SECONDS = 10  # to send a request
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\r\n\0]*)?\r\n")  # its size, extensions
TRAILER = re.compile(rb"[^\s:]+:[^\r\n\0]*\r\n")
LOCAL = ("localhost", "127.0.0.1", "::1")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

BUSY = json.dumps(ApiError(503, "too many connections: try again in a second").body())
BUSY = (
    "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    f"Content-Type: application/json\r\nContent-Length: {len(BUSY)}\r\n\r\n{BUSY}"
).encode()


class LimitedReader(io.RawIOBase):
    """A connection's bytes, so many of them and until a deadline at most: TimeoutError then."""

    def __init__(self, connection):
        self.connection, self.left = connection, MAX_HEADER
        self.deadline = time.monotonic() + SECONDS

    def readable(self):
        return True

    def readinto(self, buffer):
        """As RawIOBase has it."""
        rest = self.deadline - time.monotonic()
        if rest <= 0 or self.left <= 0:
            raise TimeoutError("too slow" if rest <= 0 else "too much")
        self.connection.settimeout(rest)
        n = self.connection.recv_into(memoryview(buffer)[: self.left])
        self.left -= n
        return n


class Server(http.server.ThreadingHTTPServer):
    """Listens for `service`, which see. Of the connections that are too many the oldest one that
    has not sent its request yet is closed: slow ones cannot keep out those that ask."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, service):
        self.service, self.lock, self.open, self.reading = service, threading.Lock(), 0, {}
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def process_request(self, request, client_address):
        """Count the connection, make room for it, and handle it in a thread."""
        with self.lock:
            self.open += 1
            self.reading[request] = time.monotonic()
            slow = next(iter(self.reading)) if self.open > MAX_CONNECTIONS else None
        if slow is request:  # all others are being answered
            return threading.Thread(target=self.refuse, args=(request,), daemon=True).start()
        if slow is not None:
            self.answered(slow)
            with contextlib.suppress(OSError):
                slow.send(BUSY)  # it may have been about to be read
                slow.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and leaves
        return super().process_request(request, client_address)

    def refuse(self, request):
        """Answer that there are too many connections."""
        with contextlib.suppress(OSError):
            request.send(BUSY)
        self.shutdown_request(request)

    def answered(self, request):
        """The connection has sent its request, or never will."""
        with self.lock:
            self.reading.pop(request, None)

    def shutdown_request(self, request):
        """Close a connection; what it still sends, for half a second, is read first, or it might
        lose our answer. It counts no more: nobody is kept out by those that go on sending."""
        self.answered(request)
        with self.lock:
            self.open -= 1
        deadline = time.monotonic() + 0.5
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            while (rest := deadline - time.monotonic()) > 0:
                request.settimeout(rest)
                if not request.recv(1 << 16):
                    break
        self.close_request(request)

    def handle_error(self, request, client_address):
        """A client that goes away is no error; anything else is ours."""
        if not isinstance(sys.exception(), (OSError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: read, checked, answered."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server_version, sys_version = "scratchlm", ""

    def setup(self):
        """Read through a LimitedReader."""
        super().setup()
        self.rfile = io.BufferedReader(LimitedReader(self.connection))
        self.sent = False

    def handle(self):
        """One request, whatever the client says of keeping the connection."""
        with contextlib.suppress(TimeoutError):
            self.handle_one_request()

    def log_message(self, *args):
        pass

    def do_GET(self):
        """Answer any method alike."""
        service, self.close_connection = self.server.service, True
        with service.lock:
            service.requests += 1
        try:
            self.check_host()
            path, query = self.address()
            if self.command == "OPTIONS":
                return self.send(204, b"", "text/plain")
            if path.startswith("/v1/models/"):
                query = {"name": urllib.parse.unquote(path.removeprefix("/v1/models/"))}
                path = "/v1/models/"
            route = service.routes.get(path)
            if route is None:
                raise ApiError(404, f"there is no {path[:80]}", code="not_found")
            method, open_to_all, function = route
            if self.command != method and not (method == "GET" and self.command == "HEAD"):
                raise ApiError(405, f"{path} takes {method}", code="method_not_allowed")
            if not open_to_all:
                self.check_key()
            if method == "POST":
                self.check_origin()
                query = self.body()
            self.server.answered(self.connection)  # all of it is here: it is slow no more
            self.give(function(service, query))
        except ApiError as e:
            self.fail(e)
        except Busy as e:
            self.fail(ApiError(429, f"{e}: try again in a second", code="rate_limit_exceeded"))
        except (ConnectionError, TimeoutError):  # the client went away
            pass
        except Exception as e:
            self.server.handle_error(self.connection, self.client_address)
            self.fail(ApiError(500, f"{type(e).__name__}: {e}"))

    do_POST = do_OPTIONS = do_HEAD = do_PUT = do_DELETE = do_PATCH = do_GET

    def send_error(self, code, message=None, explain=None):
        """What http.server finds wrong with a request, in the API's shape."""
        self.server.answered(self.connection)
        self.request_version = self.protocol_version  # or there would be no headers
        self.fail(ApiError(int(code), message or http.HTTPStatus(code).phrase))

    def address(self):
        """(path, {name: value} behind its question mark)."""
        try:
            parts = urllib.parse.urlsplit(self.path)
            return parts.path, dict(urllib.parse.parse_qsl(parts.query, max_num_fields=10))
        except ValueError as e:
            raise ApiError(400, f"the address cannot be read: {e}") from e

    def check_host(self):
        """ApiError for a Host that is not ours: a page of another site whose name was made to lead
        here (DNS rebinding). With a key that page has nothing to ask with."""
        hosts = self.headers.get_all("Host") or []
        name = hosts[0].rsplit(":", 1)[0] if len(hosts) == 1 else ""
        name = hosts[0] if name.startswith("[") and not name.endswith("]") else name
        if not name or not (self.server.service.key or name.lower().strip("[]") in LOCAL):
            raise ApiError(403, f"the Host {name[:80]!r} is not served here", code="wrong_host")

    def check_origin(self):
        """ApiError for a request that a page of another site has sent."""
        origin, host = self.headers.get("Origin"), self.headers.get("Host")
        ours = origin is None or origin == self.server.service.cors
        if not ours and origin.partition("://")[2] != host:
            raise ApiError(403, f"the Origin {origin[:80]!r} may not write", code="wrong_origin")

    def check_key(self):
        """ApiError without the key, if there is one."""
        key, given = self.server.service.key, self.headers.get("Authorization", "")
        expected = f"Bearer {key}".encode()
        if key and not hmac.compare_digest(given.encode("latin-1", "replace"), expected):
            message = "a key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    def body(self):
        """The JSON object that was sent, with one Content-Length or in chunks. What a proxy might
        understand otherwise than this server is refused."""
        lengths = self.headers.get_all("Content-Length") or []
        codings = self.headers.get_all("Transfer-Encoding") or []
        if self.headers.defects:
            raise ApiError(400, "the headers are malformed")
        if codings and (lengths or self.request_version != "HTTP/1.1"):
            raise ApiError(400, "Transfer-Encoding takes HTTP/1.1 and no Content-Length")
        if codings and [c.strip().lower() for c in codings] != ["chunked"]:
            raise ApiError(501, "the only Transfer-Encoding here is chunked")
        if codings:
            return parse_body(self.chunks())
        if len(lengths) != 1:
            raise ApiError(411, "a request needs one Content-Length, or Transfer-Encoding: chunked")
        if not lengths[0].isascii() or not lengths[0].isdigit():
            raise ApiError(400, "Content-Length is no number")
        if len(lengths[0]) > 9 or int(lengths[0]) > MAX_BODY:
            raise ApiError(413, TOO_LONG)
        self.rfile.raw.left = int(lengths[0])
        raw = self.rfile.read(int(lengths[0]))
        if len(raw) < int(lengths[0]):
            raise ApiError(400, "the body ends before its Content-Length")
        return parse_body(raw)

    def chunks(self):
        """The bytes of a body that is sent in chunks (RFC 9112, section 7.1). Extensions and
        trailers are dropped. With them it has at most MAX_BODY + MAX_HEADER bytes."""
        content, size, self.rfile.raw.left = bytearray(), None, MAX_BODY + MAX_HEADER
        malformed = ApiError(400, "the body is not in chunks of the sizes that it names")
        try:
            while size != 0:
                if not (found := CHUNK.fullmatch(self.rfile.readline())):
                    raise malformed
                size = int(found[1], 16)
                if len(content) + size > MAX_BODY:
                    raise ApiError(413, TOO_LONG)
                content += self.rfile.read(size)
                if size and self.rfile.read(2) != b"\r\n":
                    raise malformed
            while (line := self.rfile.readline()) != b"\r\n":
                if not TRAILER.fullmatch(line):
                    raise malformed
        except TimeoutError:
            if self.rfile.raw.left > 0:
                raise
            raise ApiError(413, TOO_LONG) from None
        return bytes(content)

    def head(self, status, kind, length=None, **more):
        """Send the status and the headers."""
        self.sent = True
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": length, "Connection": "close"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        if self.server.service.cors:
            headers |= {"Access-Control-Allow-Origin": self.server.service.cors, "Vary": "Origin"}
            headers |= {"Access-Control-Allow-Headers": "Authorization, Content-Type"}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def send(self, status, content, kind, **headers):
        """Send a whole answer."""
        self.head(status, kind, len(content), **headers)
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, error):
        """Send an ApiError: as the answer, or as an event of a stream that has begun."""
        content = json.dumps(error.body()).encode()
        with contextlib.suppress(OSError, TimeoutError):
            if self.sent:
                self.wfile.write(b"data: " + content + b"\n\n")
            else:
                again = {"Retry_After": 1} if error.status in (429, 503) else {}
                self.send(error.status, content, "application/json", **again)

    def give(self, answer):
        """Send what a route has returned: text, an object, or an api.Answer."""
        if isinstance(answer, str):
            kind = "text/html" if answer.startswith("<!") else "text/plain"
            more = {"Content_Security_Policy": POLICY} if kind == "text/html" else {}
            return self.send(200, answer.encode(), f"{kind}; charset=utf-8", **more)
        if isinstance(answer, dict):
            return self.send(200, json.dumps(answer).encode(), "application/json")
        self.connection.settimeout(SECONDS)
        try:
            if not answer.body.get("stream"):
                for content in answer.whole():
                    self.check_client()
                    if content is not None:
                        self.give(content)
                return None
            self.head(200, "text/event-stream")
            for chunk in answer.chunks():
                self.check_client()
                if chunk is not None:
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
        finally:
            answer.close()

    def check_client(self):
        """ConnectionError if the client has gone."""
        if select.select([self.connection], [], [], 0)[0]:
            self.connection.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                if not self.connection.recv(1 << 16):  # a second request is never read
                    raise ConnectionError
            self.connection.settimeout(SECONDS)
