"""A conversation with a model in the terminal."""
import contextlib
import json
import secrets
import select
import sys
from pathlib import Path

from data.chat import get_template, message_text
from data.cli import UserError, printable
from data.reply import THOUGHT, Reply
from data.tools import call_tool, function_schema

MAX_CALLS = 3  # tool calls in one turn of the model
CHAT_HELP = (
    "/reset forgets, /retry answers again, /system TEXT, /save FILE, /adapter NAME, /quit; "
    "Ctrl-C stops an answer"
)


class Chat:
    """A conversation: the messages so far, and how the next one is made.

    A model that was never taught to chat (its tokenizer has no role tokens) is given a transcript
    to continue instead. Before the first turn it wants `write(prompt, seed, may_call, stop)`, which
    calls stop(row, id) for each new id until that is True, and `set_adapter(*names)`.
    """

    def __init__(self, tokenizer, context, tools=None, max_tokens=200, seed=None):
        self.tokenizer, self.tools, self.context, self.seed = tokenizer, tools or {}, context, seed
        self.max_tokens = min(max_tokens, context // 2)
        self.template = get_template(tokenizer)
        self.is_base = self.template is None
        ours = self.is_base or self.template.ours
        self.schemas = [
            function_schema(name, f)
            for name, f in self.tools.items()
            if not (ours and getattr(f, "needs_no_schema", False))
        ]
        self.messages, self.turns = [], 0

    def prompt(self):
        """(ids to continue, whether the oldest turns had to be left out)."""
        room = self.context - self.max_tokens
        if not self.is_base:
            try:
                full = len(self.template.prompt_ids(self.messages, self.schemas))
                return self.template.fit_prompt(self.messages, self.schemas, room), full > room
            except ValueError as e:
                raise UserError(str(e)) from e
        said = "".join(f"{m['role'].title()}: {m['content']}\n" for m in self.messages)
        ids = self.tokenizer.encode(said + "Assistant:")
        return ids[-room:], len(ids) > room

    def tools_problem(self):
        """Why the model cannot be told of its tools; None if it can."""
        if self.is_base or not self.schemas:
            return None
        if not self.template.supports_tools:
            return "the chat template has no place for tools: the model is not told of them"
        asked = [{"role": "user", "content": "?"}]
        length = len(self.template.prompt_ids(asked, self.schemas))
        too_long = length > self.context - self.max_tokens
        return "the tools are too long for the context: not told" if too_long else None

    def turn(self, show, may_call=True):
        """Generate and remember one message; show(text) gets its words as they come. An answer
        that Ctrl-C stops is remembered as far as it went; in the middle of a call it is passed on.
        """
        stops, stopped = ["\nUser:", "\nSystem:"] if self.is_base else (), ""
        prompt, kinds = self.prompt()[0], []
        opened = () if self.is_base else self.template.opened(prompt)
        reply = Reply(self.tokenizer, self.template, stops, opened)

        def tell(new):
            for kind, text in new.items():
                show("\n\n" * (kinds[-1:] == [THOUGHT] != [kind]) + text)
                kinds.append(kind)

        def stop(r, i):
            tell(reply.feed(i))  # a call is shown when it is whole
            return reply.ended

        seed = secrets.randbits(31) if self.seed is None else self.seed + self.turns
        self.turns += 1
        try:
            self.write(prompt, seed, may_call and bool(self.tools), stop)
        except KeyboardInterrupt:
            if reply.kind == "call":
                raise
            stopped = " [stopped]"
        tell(reply.finish())
        show(stopped or "\n" * bool(kinds and reply.calls))
        message = reply.message()
        if self.is_base:
            message["content"] = message["content"].strip()
        self.messages.append(message)
        return message

    def answer(self, show):
        """Turns until the model has spoken: calls are shown, made, and what they return is fed
        back, at most MAX_CALLS times."""
        for left in reversed(range(MAX_CALLS + 1)):
            message = self.turn(show, may_call=left > 0)
            for call in message.get("tool_calls") or ():
                show(f"-> {message_text({'tool_calls': [call]})}\n")
                result = call_tool(self.tools, call)
                show(f"<- {result if len(result) < 400 else result[:400] + '…'}\n")
                about = {"tool_call_id": call["id"], "name": call["function"]["name"]}
                self.messages.append({"role": "tool", "content": result} | about)
            if not message.get("tool_calls"):
                return

    def command(self, line):
        """Do what a line with a slash says. Returns what to tell the user, or None to answer the
        last question again."""
        name, _, rest = line[1:].partition(" ")
        system = [m for m in self.messages[:1] if m["role"] == "system"]
        if name == "reset":
            self.messages = system
            return "forgotten"
        if name == "retry":
            asked = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
            if not asked:
                return "nothing has been asked yet"
            del self.messages[asked[-1] + 1 :]
            return None
        if name == "system":
            text = {"role": "system", "content": rest}
            self.messages = ([text] if rest else []) + self.messages[len(system) :]
            return "the system turn is set" if rest else "no system turn any more"
        if name == "save" and rest:
            saved = {"messages": self.messages} | ({"tools": self.schemas} if self.schemas else {})
            text = json.dumps(saved, ensure_ascii=False)
            try:
                Path(rest).write_text(text + "\n", encoding="utf-8")
            except OSError as e:
                return f"{rest}: {e.strerror}"
            return f"saved to {rest}"
        if name == "adapter":
            try:
                self.set_adapter(*rest.split())
            except UserError as e:
                return str(e)
            return f"active adapter: {rest or 'none'}"
        return CHAT_HELP


def read_message():
    """What the user types: a line, or the lines of one paste. With readline, where Python has it,
    lines can be edited and called back; in a terminal it hands a paste over as one input."""
    text = input("> " if sys.stdin.isatty() else "")
    while sys.stdin.isatty() and text[:1] != "/" and more_waits():
        text += "\n" + input()
    return text.removeprefix("\ufeff").strip()  # a byte order mark may begin what is piped in


def more_waits():
    """Is there another line already, as behind the first one of a paste? Nobody types so fast."""
    try:
        return bool(select.select([sys.stdin], [], [], 0.05)[0])
    except (OSError, ValueError):  # Windows can only ask sockets
        return False


def talk(chat):
    """Read messages, answer them, until the input ends or /quit."""
    if chat.is_base:
        print("[a base model: it continues the transcript, nobody has taught it to answer]")
    print(f"[{CHAT_HELP}]", file=sys.stderr)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() uses it from now on)
    told = False

    def show(text):
        print(printable(text), end="", flush=True)

    while True:
        try:
            line = read_message()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n[/quit or Ctrl-D leaves]", file=sys.stderr)
            continue
        except UnicodeDecodeError:
            print("[that was no UTF-8]", file=sys.stderr)
            continue
        if not line:
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            reply = chat.command(line)
            if reply is not None:
                print(f"[{reply}]")
                continue
        else:
            chat.messages.append({"role": "user", "content": line})
        try:
            if chat.prompt()[1] and not told:
                told = True
                print("[the context is full: the oldest turns are left out]", file=sys.stderr)
            chat.answer(show)
        except KeyboardInterrupt:  # in the middle of a tool
            show("[stopped]")
        except UserError as e:  # the template refuses the conversation
            chat.messages = chat.messages[:-1]
            print(f"[{e}]", file=sys.stderr)
        print()
