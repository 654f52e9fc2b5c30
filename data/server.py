"""HTTP: reads requests within limits, checks them, and sends what a data.service.Service answers.

Each connection carries one request and has a thread of its own; the model runs in the Scheduler's
thread. http.server reads the request line and the headers.
"""
import contextlib
import hmac
import http.server
import json
import math
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

MAX_BODY = 1 << 20  # bytes
MAX_CONNECTIONS = 64
SECONDS = 10  # to send a request, and to take a part of an answer
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d*)?", re.IGNORECASE)
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def serve(service, host, port):
    """Serve until Ctrl-C or SIGTERM, give answers five seconds to end, and return the exit code."""
    scheduler = service.api.scheduler
    try:
        server = Server((host, port), service)
    except OSError as e:
        raise UserError(f"--serve {port}: {host}:{port} cannot be used ({e.strerror})") from e

    def close():
        while not stop.number:
            time.sleep(0.1)
        scheduler.close(5)

    with server, StopSignal("waiting at most 5 seconds for answers to end") as stop:
        for target in server.serve_forever, close:
            threading.Thread(target=target, daemon=True).start()
        name = f"[{host}]" if ":" in host else host
        print(f"http://{name}:{server.server_port}/", flush=True)
        # In this thread, which loaded the model: each thread that computes has OpenMP threads of
        # its own, and with more of them than cores none waits actively (4 to 11 % slower).
        scheduler.run()
        server.shutdown()
        deadline = time.monotonic() + 1  # for the last bytes to be sent
        while server.open and time.monotonic() < deadline:
            time.sleep(0.02)
    return 128 + stop.number


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections for `service`. Closes those that have not sent their request after
    SECONDS, and the oldest of them when more than MAX_CONNECTIONS are open."""

    request_queue_size = 128

    def __init__(self, address, service):
        self.service, self.lock = service, threading.Lock()
        self.open = {}  # connection: until when its request must arrive; infinity once it has
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def process_request(self, request, client_address):
        """Handle a connection in a thread."""
        with self.lock:
            self.open[request] = time.monotonic() + SECONDS
        self.service_actions()  # before a thread reads this request, too
        super().process_request(request, client_address)

    def service_actions(self):  # also called by serve_forever, twice a second
        with self.lock:
            for connection, deadline in list(self.open.items()):
                excess = len(self.open) > MAX_CONNECTIONS and deadline < math.inf
                if excess or deadline < time.monotonic():
                    del self.open[connection]
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)  # its thread then reads EOF

    def finish_reading(self, connection):
        """Note that the request has arrived; ConnectionError if `service_actions` was faster."""
        with self.lock:
            if connection not in self.open:
                raise ConnectionError
            self.open[connection] = math.inf

    def shutdown_request(self, request):
        """Close a connection. What the client still sends is read for half a second: otherwise the
        answer might be lost. The connection no longer counts as open meanwhile."""
        with self.lock:
            self.open.pop(request, None)
        deadline = time.monotonic() + 0.5
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            while (seconds := deadline - time.monotonic()) > 0:
                request.settimeout(seconds)
                if not request.recv(1 << 16):
                    break
        self.close_request(request)

    def handle_error(self, request, client_address):
        """Print an error, unless the client has only gone away."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def to_json(value):
    """Encode as JSON in UTF-8, so that Chinese is readable; a lone surrogate becomes a ?."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads, checks and answers one request."""

    protocol_version, server_version, sys_version = "HTTP/1.1", "scratchlm", ""
    timeout, disable_nagle_algorithm = SECONDS, True
    head_sent = False

    def log_message(self, *args):
        pass

    def do_GET(self):
        service, self.close_connection = self.server.service, True
        try:
            if self.command == "OPTIONS":
                return self.send(200, b"", "text/plain")
            function, argument = self.route()
            self.server.finish_reading(self.connection)
            self.give(function(service, argument))
        except ApiError as e:
            self.fail(e)
        except Busy as e:
            closing = service.api.scheduler.closing
            status, code = (503, None) if closing else (429, "rate_limit_exceeded")
            self.fail(ApiError(status, f"{e}: try again in a second", code=code))
        except (ConnectionError, TimeoutError):  # the client is gone: nobody is left to answer
            pass
        except Exception as e:
            self.server.handle_error(self.connection, self.client_address)
            self.fail(ApiError(500, f"{type(e).__name__}: {e}"))

    do_POST = do_OPTIONS = do_PUT = do_DELETE = do_PATCH = do_GET

    def route(self):
        """(function of ROUTES, query or body); ApiError if the request is not allowed."""
        service, host = self.server.service, self.headers.get("Host", "")
        # another Host may be a foreign site's name that resolves to this machine (DNS
        # rebinding); where a key is needed, that site's pages do not have it
        if not (service.key or LOCAL_HOST.fullmatch(host)):
            raise ApiError(403, f"the Host {host[:80]!r} is not served here")
        path, _, query = self.path.partition("?")
        argument = dict(urllib.parse.parse_qsl(query))
        if path.startswith("/v1/models/"):
            argument = {"name": urllib.parse.unquote(path.removeprefix("/v1/models/"))}
            path = "/v1/models/"
        if path not in ROUTES:
            raise ApiError(404, f"there is no {path[:80]}", code="not_found")
        method, is_public, function = ROUTES[path]
        if self.command != method:
            raise ApiError(405, f"{path} takes {method}", code="method_not_allowed")
        given = self.headers.get("Authorization", "").encode()
        has_key = hmac.compare_digest(given, f"Bearer {service.key}".encode())
        if service.key and not is_public and not has_key:
            message = "a key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
        if method == "GET":
            return function, argument
        origin = self.headers.get("Origin")
        if origin not in (None, service.cors) and origin.partition("://")[2] != host:
            message = f"pages of the Origin {origin[:80]!r} may not write here"
            raise ApiError(403, message, code="wrong_origin")
        return function, parse_body(self.body())

    def body(self):
        """The body of the request, which has one Content-Length or is sent in chunks."""
        lengths = self.headers.get_all("Content-Length") or []
        codings = self.headers.get_all("Transfer-Encoding") or []
        if [coding.strip().lower() for coding in codings] == ["chunked"] and not lengths:
            return self.chunks()
        if codings or len(lengths) != 1 or not re.fullmatch("[0-9]{1,9}", lengths[0]):
            raise ApiError(411, "a request needs one Content-Length or Transfer-Encoding: chunked")
        return self.read(int(lengths[0]))

    def read(self, size, length=0):
        """The next `size` bytes of a body of which `length` bytes have been read."""
        if length + size > MAX_BODY:
            raise ApiError(413, f"the body is longer than {MAX_BODY:,} bytes")
        content = self.rfile.read(size)
        if len(content) < size:
            raise ApiError(400, "the body ends too early")
        return content

    def chunks(self):
        """A body in chunks, each after a line with its size: RFC 9112, section 7.1."""
        content, size = b"", 1
        while size:
            line = self.rfile.readline(1 << 12)
            if not (match := re.fullmatch(rb"([0-9a-fA-F]{1,8})[ \t]*(;.*)?\r\n", line)):
                raise ApiError(400, "the body is not in chunks of the sizes that it names")
            size = int(match[1], 16)
            content += self.read(size, len(content))
            if size and self.read(2) != b"\r\n":
                raise ApiError(400, "a chunk is longer than its size")
        while self.rfile.readline(1 << 12).strip():  # trailers
            pass
        return content

    def send_head(self, status, content_type, **headers):
        """Send the status and the headers."""
        self.head_sent, cors = True, self.server.service.cors
        self.send_response(status)
        headers |= {"Content_Type": content_type, "Connection": "close"}
        headers |= {"X_Content_Type_Options": "nosniff", "Cache_Control": "no-store"}
        headers["Content_Security_Policy"] = POLICY
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
        content = to_json(error.body)
        with contextlib.suppress(OSError):
            if self.head_sent:
                self.wfile.write(b"data: " + content + b"\n\n")
            else:
                retry = {"Retry_After": 1} if error.status in (429, 503) else {}
                self.send(error.status, content, **retry)

    def give(self, answer):
        """Send the result of a route: a text, an object, or a data.answer.Answer."""
        if isinstance(answer, str):
            kind = "html" if answer.startswith("<!") else "plain"
            return self.send(200, answer.encode(), f"text/{kind}; charset=utf-8")
        if isinstance(answer, dict):
            return self.send(200, to_json(answer))
        stream = answer.body.get("stream")
        try:
            if stream:
                self.send_head(200, "text/event-stream")
            for content in answer.chunks() if stream else answer.result():
                readable = select.select([self.connection], [], [], 0)[0]
                if readable and not self.connection.recv(1 << 16):  # further bytes are ignored
                    raise ConnectionError
                if content and stream:
                    self.wfile.write(b"data: " + to_json(content) + b"\n\n")
                elif content:
                    self.give(content)
            if stream:
                self.wfile.write(b"data: [DONE]\n\n")
        finally:
            for job in answer.jobs:
                job.cancelled = True
