"""HTTP: reads requests within limits, checks them, and sends what a data.service.Service answers.

One request a connection, a thread each; the model runs in the Scheduler's thread. Only the standard
library: http.server reads the request line and headers, the limits are here.
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
from data.cli import StopSignal, UserError
from data.scheduler import Busy
from data.service import ROUTES

MAX_HEADER = 1 << 16  # bytes
MAX_BODY = 1 << 20
TOO_LONG = f"the body is longer than {MAX_BODY:,} bytes"
MAX_CONNECTIONS = 64
SECONDS = 10  # to send a request
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\r\n\0]*)?\r\n")  # its size, extensions
TRAILER = re.compile(rb"[^\s:]+:[^\r\n\0]*\r\n")
LOCAL = ("localhost", "127.0.0.1", "::1")
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d*)?", re.IGNORECASE)
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve(service, host, port):
    """Serve until Ctrl-C or SIGTERM; answers in progress then have five seconds. Returns the exit
    code."""
    scheduler = service.api.scheduler
    try:
        server = Server((host, port), service)
    except OSError as e:
        raise UserError(f"--serve {port}: {host}:{port} cannot be used ({e.strerror})") from e
    with server, StopSignal() as stop:
        scheduler.start()
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        name = f"[{host}]" if ":" in host else host
        print(f"http://{name}:{server.server_port}/", flush=True)
        while not stop.number and scheduler.is_alive():
            time.sleep(0.1)
        scheduler.close(5)
        server.shutdown()
        deadline = time.monotonic() + 1  # for the last bytes to be sent
        while server.open and time.monotonic() < deadline:
            time.sleep(0.02)
    return 128 + stop.number


class LimitedReader(io.RawIOBase):
    """Reads at most `left` bytes of a connection until a deadline, then raises TimeoutError."""

    def __init__(self, connection):
        self.connection, self.left = connection, MAX_HEADER
        self.deadline = time.monotonic() + SECONDS

    def readable(self):
        return True

    def readinto(self, buffer):
        """As in RawIOBase."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0 or self.left <= 0:
            raise TimeoutError
        self.connection.settimeout(seconds)
        n = self.connection.recv_into(memoryview(buffer)[: self.left])
        self.left -= n
        return n


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections for `service`. When more than 64 are open, the oldest one that has not
    sent its request is closed."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, service):
        self.service, self.lock, self.open, self.reading = service, threading.Lock(), 0, {}
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def process_request(self, request, client_address):
        """Handle a connection in a thread."""
        with self.lock:
            self.open += 1
            self.reading[request] = True
            oldest = next(iter(self.reading)) if self.open > MAX_CONNECTIONS else None
        if self.finish_reading(oldest):
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and returns
        super().process_request(request, client_address)

    def finish_reading(self, request):
        """Note that no more of the connection's request is awaited; False if none was."""
        with self.lock:
            return self.reading.pop(request, False)

    def shutdown_request(self, request):
        """Close a connection. What the client still sends is read for half a second: otherwise the
        answer might be lost. The connection no longer counts as open meanwhile."""
        self.finish_reading(request)
        with self.lock:
            self.open -= 1
        deadline = time.monotonic() + 0.5
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            while (seconds := deadline - time.monotonic()) > 0:
                request.settimeout(seconds)
                if not request.recv(1 << 16):
                    break
        self.close_request(request)

    def handle_error(self, request, client_address):
        """Print errors of ours; a client that goes away is none."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads, checks and answers one request."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server_version, sys_version = "scratchlm", ""

    def setup(self):
        super().setup()
        self.rfile, self.sent = io.BufferedReader(LimitedReader(self.connection)), False

    def handle(self):
        with contextlib.suppress(TimeoutError):
            self.handle_one_request()

    def log_message(self, *args):
        pass

    def do_GET(self):
        service, self.close_connection = self.server.service, True
        with service.lock:
            service.requests += 1
        try:
            # another Host may be a foreign site's name that resolves to this machine (DNS
            # rebinding); where a key is needed, that site's pages do not have it
            hosts = self.headers.get_all("Host") or [""]
            if len(hosts) > 1 or not (service.key or LOCAL_HOST.fullmatch(hosts[0])):
                raise ApiError(403, f"the Host {hosts[0][:80]!r} is not served here")
            if self.command == "OPTIONS":
                return self.send(204, b"", "text/plain")
            function, argument = self.route()
            if not self.server.finish_reading(self.connection):
                raise ConnectionError  # it was closed as the oldest one
            self.give(function(service, argument))
        except ApiError as e:
            self.fail(e)
        except Busy as e:
            self.fail(ApiError(429, f"{e}: try again in a second", code="rate_limit_exceeded"))
        except (ConnectionError, TimeoutError):  # the client went away
            pass
        except Exception as e:
            self.server.handle_error(self.connection, self.client_address)
            self.fail(ApiError(500, f"{type(e).__name__}: {e}"))

    do_POST = do_OPTIONS = do_PUT = do_DELETE = do_PATCH = do_GET

    def route(self):
        """(function of ROUTES, query or body); ApiError if the request is not allowed."""
        service = self.server.service
        try:
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query, max_num_fields=10))
        except ValueError as e:
            raise ApiError(400, f"the address cannot be read: {e}") from e
        path, slash, name = url.path.partition("/v1/models/")
        if slash and not path:
            query = {"name": urllib.parse.unquote(name)}
        path += slash or ""
        if path not in ROUTES:
            raise ApiError(404, f"there is no {path[:80]}", code="not_found")
        method, is_public, function = ROUTES[path]
        if self.command != method:
            raise ApiError(405, f"{path} takes {method}", code="method_not_allowed")
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        has_key = hmac.compare_digest(given, f"Bearer {service.key}".encode())
        if service.key and not is_public and not has_key:
            message = "a key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
        if method == "GET":
            return function, query
        origin = self.headers.get("Origin")
        same = origin is None or origin.partition("://")[2] == self.headers.get("Host")
        if not same and origin != service.cors:
            message = f"pages of the Origin {origin[:80]!r} may not write here"
            raise ApiError(403, message, code="wrong_origin")
        return function, parse_body(self.body())

    def body(self):
        """The bytes of the body, which has one Content-Length or is sent in chunks. What a proxy
        might read in another way is refused."""
        lengths = self.headers.get_all("Content-Length") or []
        codings = self.headers.get_all("Transfer-Encoding") or []
        if self.headers.defects or (codings and (lengths or self.request_version != "HTTP/1.1")):
            raise ApiError(400, "the headers are malformed or contradict each other")
        if codings and [coding.strip().lower() for coding in codings] != ["chunked"]:
            raise ApiError(501, "the only Transfer-Encoding here is chunked")
        if codings:
            return self.chunks()
        if len(lengths) != 1 or not re.fullmatch("[0-9]+", lengths[0]):
            raise ApiError(411, "a request needs one Content-Length, or Transfer-Encoding: chunked")
        if len(lengths[0]) > 9 or int(lengths[0]) > MAX_BODY:
            raise ApiError(413, TOO_LONG)
        self.rfile.raw.left = int(lengths[0])
        content = self.rfile.read(int(lengths[0]))
        if len(content) < int(lengths[0]):
            raise ApiError(400, "the body ends before its Content-Length")
        return content

    def chunks(self):
        """The bytes of a body sent in chunks (RFC 9112, section 7.1). Its extensions and trailers
        are dropped; they may have MAX_HEADER bytes."""
        content, size, self.rfile.raw.left = bytearray(), None, MAX_BODY + MAX_HEADER
        malformed = ApiError(400, "the body is not in chunks of the sizes that it names")
        while size != 0:
            if not (header := CHUNK.fullmatch(self.rfile.readline())):
                raise malformed
            size = int(header[1], 16)
            if len(content) + size > MAX_BODY:
                raise ApiError(413, TOO_LONG)
            content += self.rfile.read(size)
            if size and self.rfile.read(2) != b"\r\n":
                raise malformed
        while (line := self.rfile.readline()) != b"\r\n":
            if not TRAILER.fullmatch(line):
                raise malformed
        return bytes(content)

    def send_head(self, status, content_type, **headers):
        """Send the status and the headers."""
        self.sent, cors = True, self.server.service.cors
        self.send_response(status)
        headers |= {"Content_Type": content_type, "Connection": "close"}
        headers |= {"X_Content_Type_Options": "nosniff", "Cache_Control": "no-store"}
        if cors:
            headers |= {"Access_Control_Allow_Origin": cors, "Vary": "Origin"}
            headers |= {"Access_Control_Allow_Headers": "Authorization, Content-Type"}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, status, content, content_type="application/json", **headers):
        """Send a complete answer."""
        self.send_head(status, content_type, Content_Length=len(content), **headers)
        self.wfile.write(content)

    def fail(self, error):
        """Send an ApiError: as the answer, or as an event of a stream that has begun."""
        content = json.dumps(error.body).encode()
        with contextlib.suppress(OSError):
            if self.sent:
                self.wfile.write(b"data: " + content + b"\n\n")
            else:
                retry = {"Retry_After": 1} if error.status in (429, 503) else {}
                self.send(error.status, content, **retry)

    def give(self, answer):
        """Send the result of a route: a text, an object, or a data.answer.Answer."""
        if isinstance(answer, str):
            kind = "text/html" if answer.startswith("<!") else "text/plain"
            policy = {"Content_Security_Policy": POLICY} if kind == "text/html" else {}
            return self.send(200, answer.encode(), f"{kind}; charset=utf-8", **policy)
        if isinstance(answer, dict):
            return self.send(200, json.dumps(answer).encode())
        self.connection.settimeout(SECONDS)
        stream = answer.body.get("stream")
        try:
            if stream:
                self.send_head(200, "text/event-stream")
            for content in answer.chunks() if stream else answer.result():
                readable = select.select([self.connection], [], [], 0)[0]
                if readable and not self.connection.recv(1 << 16):  # a second request is not read
                    raise ConnectionError
                if content and stream:
                    self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
                elif content:
                    self.give(content)
            if stream:
                self.wfile.write(b"data: [DONE]\n\n")
        finally:
            answer.close()
