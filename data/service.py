"""What a server answers: OpenAI's API, the page, and what the page asks for."""
import base64
import json
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace

from data.answer import ApiError
from data.api import Api
from data.chat import tool_call
from data.cli import MALFORMED, UserError, quoted
from data.rows import to_example
from data.runs import OUT, read_run, run_list, run_settings
from data.tokenizer import labels_of
from data.tools import call_tool

PAGE = Path(__file__).with_name("page.html")
CHOICES = OUT / "choices.jsonl"
LOCAL = ("localhost", "127.0.0.1", "::1")


class Service:
    """Answers the requests of ROUTES with the model of a Scheduler.

    adapters, allowed, settings    see Api
    tools       {name: function}, which the page may call
    classify    classify(text) gives [(label, probability)], if the model is a classifier
    draw        draw(text, seed) iterates over PNGs of digits, or None where none were trained
    ckpt        the checkpoint to name in the command for finetune.py
    args        sample.py's flags; UserError for an unsafe --host, --api_key or --cors
    """

    def __init__(
        self, scheduler, tokenizer, adapters, allowed, settings, tools, classify, draw, ckpt, args
    ):
        self.key = args.api_key or os.environ.get("SCRATCHLM_API_KEY")
        self.cors = args.cors
        if args.host not in (None, *LOCAL) and not self.key:
            raise UserError(f"--host {args.host} opens the server to others: give it an --api_key")
        if self.key and not re.fullmatch("[!-~]+", self.key):
            raise UserError("--api_key must be ASCII without spaces, since it is sent in a header")
        if self.cors and not re.fullmatch(r"https?://[^/\s]+", self.cors):
            raise UserError(f"--cors {self.cors} is not an origin like https://example.org")
        context, labels = scheduler.engine.context, labels_of(tokenizer)
        self.api = Api(scheduler, tokenizer, adapters, context, allowed, settings, tools)
        self.tools, self.classify, self.draw = tools, classify if labels else None, draw
        self.lock = threading.Lock()  # of CHOICES
        command = f"python finetune.py --ckpt {quoted(ckpt)} --data {CHOICES}"
        run = run_settings(args.adapter[0] if args.adapter else ckpt)
        self.info = {  # what the page shows
            "kind": "classifier" if labels else "chat" if self.api.template else "base",
            "models": self.api.names,
            "labels": labels,
            "settings": settings,
            "context": context,
            "max_tokens": min(args.max_new_tokens, context // 2),
            "system": args.system or "",
            "tools": self.api.tools,
            "draws": draw is not None,
            "told": self.api.told(self.api.tools) or None,
            "databases": {name: getattr(f, "database", "") for name, f in tools.items()},
            "run": {name: run.get(name) for name in ("data", "parameters")},
            "examples": run.get("examples") or [],
            "choices": {"file": str(CHOICES), "command": command},
        }

    def health(self, _):
        """Whether the model's thread is alive."""
        if self.api.scheduler.ended.is_set():
            raise ApiError(503, "the model's thread has ended")
        return {"status": "ok"}

    def page_info(self, _):
        """What the page shows of the model, and the number of choices so far."""
        count = CHOICES.read_bytes().count(b"\n") if CHOICES.exists() else 0
        return self.info | {"choices": self.info["choices"] | {"count": count}}

    def run_tool(self, body):
        """The result of a tool call."""
        name, arguments = body.get("name"), body.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise ApiError(400, "name and arguments must be texts")
        return {"content": call_tool(self.tools, tool_call(name, arguments))}

    def labels(self, body):
        """The labels of a text with their probabilities, the likeliest first."""
        text = body.get("text")
        if self.classify is None or not isinstance(text, str):
            raise ApiError(400, "this needs a text, and a model that is a classifier")
        labels = self.api.scheduler.call(lambda: self.classify(text))
        return {"labels": [{"label": label, "p": p} for label, p in labels]}

    def choose(self, body):
        """Append a preference pair to CHOICES."""
        row = {k: body[k] for k in ("prompt", "tools", "chosen", "rejected") if k in body}
        try:
            to_example(row)  # as finetune.py will
        except MALFORMED as e:
            raise ApiError(400, f"finetune.py could not learn from this: {e}") from e
        with self.lock:
            CHOICES.parent.mkdir(exist_ok=True)
            with open(CHOICES, "a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {"count": self.page_info({})["choices"]["count"]}

    def drawing(self, body):
        """A stream of PNGs of the digits in a text, each {"image": data URL}."""
        text, seed = body.get("text"), body.get("seed", 0)
        if self.draw is None:
            raise ApiError(404, "no digits were trained here: python mnist.py --diffusion")
        digits = text.replace(" ", "") if isinstance(text, str) else ""
        if not 1 <= len(digits) <= 20 or type(seed) is not int or seed >> 50:
            raise ApiError(400, "this needs a text of 1 to 20 digits, and perhaps a seed")
        try:
            pictures = self.draw(text, seed)
        except UserError as e:
            raise ApiError(400, str(e)) from e

        def chunks():  # each is computed between two steps of the texts, when it is asked for
            while content := self.api.scheduler.call(lambda: next(pictures, None)):
                yield {"image": f"data:image/png;base64,{base64.b64encode(content).decode()}"}

        return SimpleNamespace(body={"stream": True}, chunks=chunks, jobs=())

    def run_metrics(self, query):
        """The settings and metrics of one run."""
        name = query.get("name", "")
        if name not in [run["name"] for run in run_list()]:
            raise ApiError(404, f"there is no run {name[:80]!r} in {OUT}/")
        return read_run(name)


# path: (method, whether no key is needed, function of a Service and the request's query or body)
ROUTES = {
    "/": ("GET", True, lambda s, _: PAGE.read_text(encoding="utf-8")),
    "/health": ("GET", True, Service.health),
    "/v1/models": ("GET", False, lambda s, _: s.api.list_models()),
    "/v1/models/": ("GET", False, lambda s, query: s.api.model(query["name"])),
    "/v1/chat/completions": ("POST", False, lambda s, body: s.api.chat(body)),
    "/v1/completions": ("POST", False, lambda s, body: s.api.completion(body)),
    "/tokenize": ("POST", False, lambda s, body: s.api.tokenize(body)),
    "/tokenizer_info": ("GET", False, lambda s, _: s.api.tokenizer_info()),
    "/page/info": ("GET", False, Service.page_info),
    "/page/tool": ("POST", False, Service.run_tool),
    "/page/classify": ("POST", False, Service.labels),
    "/page/choose": ("POST", False, Service.choose),
    "/page/draw": ("POST", False, Service.drawing),
    "/page/runs": ("GET", False, lambda s, _: {"runs": run_list()}),
    "/page/run": ("GET", False, Service.run_metrics),
}
