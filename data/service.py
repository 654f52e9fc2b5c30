"""What a server answers: OpenAI's API, the page, and what the page asks for."""
import json
import threading
import time
from pathlib import Path

from data.answer import ApiError
from data.chat import tool_call
from data.cli import StopSignal, UserError
from data.rows import to_example
from data.runs import OUT, read_run, run_list
from data.server import Server
from data.tools import call_tool

PAGE = Path(__file__).with_name("page.html")
CHOICES = OUT / "choices.jsonl"


class Service:
    """What a Server serves: an Api, and for the page `info`, tools {name: function} and
    classify(text) -> [(label, probability)] (None for what is no classifier)."""

    def __init__(self, api, info, tools, classify=None, key=None, cors=None):
        self.api, self.tools, self.classify, self.key, self.cors = api, tools, classify, key, cors
        self.info, self.requests, self.lock = info, 0, threading.Lock()
        self.routes = ROUTES

    def page(self, _):
        """The page."""
        return PAGE.read_text(encoding="utf-8")

    def health(self, _):
        """Whether the model's thread is alive."""
        if not self.api.scheduler.is_alive():
            raise ApiError(503, "the model's thread has ended")
        return {"status": "ok"}

    def metrics(self, _):
        """Figures for Prometheus."""
        count = f"# TYPE scratchlm_requests_total counter\nscratchlm_requests_total {self.requests}"
        return "\n".join([count, *self.api.scheduler.lines(), ""])

    def about(self, _):
        """What the page must know."""
        count = 0
        if CHOICES.exists():
            with open(CHOICES, "rb") as f:
                count = sum(1 for _ in f)
        return self.info | {"choices": self.info["choices"] | {"count": count}}

    def run_tool(self, body):
        """What a tool returns for a call of the page's."""
        name, arguments = body.get("name"), body.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise ApiError(400, "name and arguments must be texts")
        if not self.tools:
            raise ApiError(404, "this server has no tools: start it with --tools")
        return {"content": call_tool(self.tools, tool_call(name, arguments))}

    def verdict(self, body):
        """The labels of a text with their probabilities, the likeliest first."""
        text = body.get("text")
        if self.classify is None or not isinstance(text, str):
            raise ApiError(400, "a text is needed, and a model that is a classifier")
        best = self.api.scheduler.call(lambda: self.classify(text))
        return {"labels": [{"label": label, "p": p} for label, p in best]}

    def choose(self, body):
        """Append a preference pair to CHOICES."""
        row = {k: body[k] for k in ("prompt", "messages", "chosen", "rejected") if k in body}
        row["prompt"] = row.pop("messages", row.get("prompt"))
        try:
            _, example = to_example(row)  # as finetune.py will
            json.dumps(example, ensure_ascii=False).encode()  # and its text must be text
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise ApiError(400, f"this cannot be learned: {e}") from e
        with self.lock:
            CHOICES.parent.mkdir(exist_ok=True)
            with open(CHOICES, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {"count": self.about({})["choices"]["count"]}

    def runs(self, _):
        """All runs in out/, the newest first."""
        return {"runs": run_list()}

    def run(self, query):
        """The settings and metrics of one run."""
        if query.get("name") not in [run["name"] for run in run_list()]:
            raise ApiError(404, f"there is no run {query.get('name', '')[:80]!r} in {OUT}/")
        return read_run(query["name"])

    def serve(self, host, port):
        """Serve until Ctrl-C or SIGTERM: answers that are being written have five seconds then.
        Returns the exit code."""
        scheduler = self.api.scheduler
        try:
            server = Server((host, port), self)
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
            deadline = time.monotonic() + 1  # for the last words to be sent
            while server.open and time.monotonic() < deadline:
                time.sleep(0.02)
        return 128 + stop.number


# path: (method, whether it is open to all, what answers it)
ROUTES = {
    "/": ("GET", True, Service.page),
    "/health": ("GET", True, Service.health),
    "/metrics": ("GET", False, Service.metrics),
    "/v1/models": ("GET", False, lambda s, _: s.api.models()),
    "/v1/models/": ("GET", False, lambda s, query: s.api.model(query["name"])),
    "/v1/chat/completions": ("POST", False, lambda s, body: s.api.chat(body)),
    "/v1/completions": ("POST", False, lambda s, body: s.api.completion(body)),
    "/tokenize": ("POST", False, lambda s, body: s.api.tokenize(body)),
    "/detokenize": ("POST", False, lambda s, body: s.api.detokenize(body)),
    "/tokenizer_info": ("GET", False, lambda s, _: s.api.tokenizer_info()),
    "/page/info": ("GET", False, Service.about),
    "/page/tool": ("POST", False, Service.run_tool),
    "/page/classify": ("POST", False, Service.verdict),
    "/page/choose": ("POST", False, Service.choose),
    "/page/runs": ("GET", False, Service.runs),
    "/page/run": ("GET", False, Service.run),
}
