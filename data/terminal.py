"""A conversation with a model in the terminal."""
import contextlib
import json
import secrets
import sys
from pathlib import Path

from data.chat import get_template, message_text
from data.cli import UserError, printable
from data.reply import Reply
from data.tools import call_tool, function_schema, known_by_training

MAX_CALLS = 3  # tool calls in one turn of the model
CHAT_HELP = (
    "/reset forgets, /retry answers again, /system TEXT, /save FILE, /adapter lists, "
    "/adapter NAME, /quit; Ctrl-C stops an answer"
)


class Chat:
    """A conversation. The caller sets `write(prompt, seed, may_call, stop)`, which calls stop(row,
    id) for each new id until it returns True, and `set_adapter(name)`, which activates that adapter
    (none for "none"; the active one stays for ""), and returns their names as a text."""

    def __init__(self, tokenizer, context, tools=None, max_tokens=200, seed=None):
        self.tokenizer, self.tools, self.seed = tokenizer, tools or {}, seed
        self.max_tokens = min(max_tokens, context // 2)
        self.room = context - self.max_tokens  # for the prompt
        self.template, self.messages, self.turns = get_template(tokenizer), [], 0
        if self.template is None:
            raise UserError("this model has no chat template: use --prompt, or fine-tune it first")
        known = known_by_training(self.tools) if self.template.ours else ()
        self.schemas = [function_schema(n, f) for n, f in self.tools.items() if n not in known]

    def ask(self, text):
        """Append a question; it replaces one that was not answered, and what followed it."""
        spoken = (i for i, m in enumerate(self.messages) if m["role"] not in ("user", "tool"))
        last = max((i for i in spoken if not self.messages[i].get("tool_calls")), default=-1)
        self.messages[last + 1 :] = [{"role": "user", "content": text}]

    def tools_problem(self):
        """Why the model cannot be told of its tools; None if it can."""
        question = [{"role": "user", "content": "?"}]
        if self.schemas and not self.template.supports_tools:
            return "the chat template has no place for tools: the model is not told of them"
        if len(self.template.prompt_ids(question, self.schemas)) > self.room:
            return "the tools are too long for the context: the model is not told of them"

    def turn(self, show, may_call):
        """Generate and remember one message; show(text) gets its text as it comes. Ctrl-C ends the
        message, or within a call the whole answer."""
        prompt = self.template.fit_prompt(self.messages, self.schemas, self.room)
        reply = Reply(self.tokenizer, self.template, ids=self.template.opened(prompt))
        kind = stopped = ""

        def show_new(new):
            nonlocal kind
            for new_kind, text in new.items():
                show("\n\n" * (kind == "reasoning_content" != new_kind) + text)
                kind = new_kind

        def stop(row, i):
            show_new(reply.feed(i))
            return reply.ended

        seed = secrets.randbits(31) if self.seed is None else self.seed + self.turns
        self.turns += 1
        try:
            self.write(prompt, seed, may_call, stop)
        except KeyboardInterrupt:
            if reply.kind == "call":
                raise
            stopped = " [stopped]"
        show_new(reply.finish())
        show(stopped or "\n" * bool(kind and reply.calls))
        self.messages.append(reply.message())
        return reply.calls

    def answer(self, show):
        """Generate turns until one calls no tool. Results are fed back at most MAX_CALLS times."""
        for left in reversed(range(MAX_CALLS + 1)):
            calls = self.turn(show, left > 0 and bool(self.tools))
            for call in calls:
                show(f"-> {message_text({'tool_calls': [call]})}\n")
                result = call_tool(self.tools, call)
                show(f"<- {result if len(result) < 400 else result[:400] + '…'}\n")
                names = {"tool_call_id": call["id"], "name": call["function"]["name"]}
                self.messages.append({"role": "tool", "content": result} | names)
            if not calls:
                return

    def command(self, line):
        """Carry out a /command. Returns a note for the user, or None to answer once more."""
        name, _, rest = line[1:].partition(" ")
        n_system = sum(m["role"] == "system" for m in self.messages[:1])
        questions = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        try:
            if name == "reset":
                del self.messages[n_system:]
                return "forgotten"
            if name == "retry" and questions:
                del self.messages[questions[-1] + 1 :]
                return None
            if name == "system":
                self.messages[:n_system] = [{"role": "system", "content": rest}] if rest else []
                return f"system message: {rest or 'none'}"
            if name == "save" and rest:
                row = {"messages": self.messages, "tools": self.schemas}
                text = json.dumps({k: v for k, v in row.items() if v}, ensure_ascii=False)
                Path(rest).write_text(text + "\n", encoding="utf-8")
                return f"saved to {rest}"
            if name == "adapter":
                return f"adapters: {self.set_adapter(rest.strip())}"
        except (OSError, UserError) as e:
            return str(e)
        return "nothing has been asked yet" if name == "retry" else CHAT_HELP


def talk(chat):
    """Read messages and answer them until the input ends or /quit."""
    print(f"[{CHAT_HELP}]", file=sys.stderr)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it from now on; a paste is then one input)
    warned = False
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").removeprefix("\ufeff").strip()
            if line == "/quit":
                return
            if line.startswith("/") and (note := chat.command(line)):
                print(f"[{note}]")
                continue
            if not line:
                continue
            if line[0] != "/":
                chat.ask(line)
            length = len(chat.template.prompt_ids(chat.messages, chat.schemas))
            if length > chat.room and not warned:
                print("[the context is full: the oldest turns are left out]", file=sys.stderr)
                warned = True
            chat.answer(lambda text: print(printable(text), end="", flush=True))
        except EOFError:
            return
        except UnicodeDecodeError:
            print("[that was not UTF-8]", file=sys.stderr)
        except ValueError as e:  # the template refuses the conversation
            print(f"[{e}]", file=sys.stderr)
        except KeyboardInterrupt:
            print("[stopped; /quit or Ctrl-D leaves]")
        else:
            print()
