"""data/page.html in a browser (SCRATCHLM_CHROMIUM), talking to servers with tiny models."""

import functools
import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from conftest import BYTE, CHAT, ROOT, serving, turn

import data.server
import mnist
import model as lm
import sample
from data.batches import preference_rows
from data.rows import read_examples
from data.tokenizer import label_token
from data.tools import load_tools

CHROMIUM = os.environ.get("SCRATCHLM_CHROMIUM", "/usr/bin/chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"no browser at {CHROMIUM}")
expect = playwright.expect
expect.set_options(timeout=15_000)
LETTERS = list(b"abcdefghijklmnopqrstuvwxyz ")  # what the models write: a random row of these
CHOICES = Path("out/choices.jsonl")
ASKED = [f"ask {n}" for n in range(4)]
RUN = {"data": "rows.jsonl", "examples": ASKED, "parameters": 12345}  # the chat model's
ANSWERS = "#log .answer .text"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The servers' folder, in which out/ is."""
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("served"))
        Path("out/chat").mkdir(parents=True)
        Path("out/chat/settings.json").write_text(json.dumps(RUN))
        yield


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def serve(name, tokenizer, tools=None):
    """A fixture: a server for all tests of this file, whose model writes letters and never ends by
    itself."""

    @pytest.fixture(scope="module")
    def server(folder):
        torch.manual_seed(0)
        shape = dict(vocab_size=320, n_layer=1, n_head=2, d_model=16, head_bias=True)
        model = lm.Transformer(lm.Config(context=8192, **shape)).eval()
        with torch.no_grad():
            model.head.bias.fill_(-50)[LETTERS] = 0
        flags = ["--ckpt", f"out/{name}", "--max_new_tokens", "24", "--temperature", "1"]
        args, ckpt = sample.build_parser().parse_args(flags), Path("out", name, "best.pt")
        service = sample.make_service(model, tokenizer, ckpt, args, tools)
        threading.Thread(target=service.api.scheduler.run, daemon=True).start()
        with serving(data.server.Server(("127.0.0.1", 0), service)) as server:
            server.url = f"http://127.0.0.1:{server.server_port}/"
            yield server

    return server


chat = serve("chat", CHAT, load_tools("hotel"))
base = serve("base", BYTE)
critic = serve("critic", BYTE.with_special([label_token("neg"), label_token("pos")]))


@pytest.fixture
def visit(browser):
    """visit(server, view): the page in a fresh tab. A script that fails there fails the test."""
    contexts, errors = [], []

    def open_page(server, view="#talk", locale="en-US", stored=None, **options):
        options = {"viewport": {"width": 1280, "height": 800}} | options
        context = browser.new_context(locale=locale, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(server.url + view)
        ready(page)
        if stored:  # as if the conversation had been held before a reload
            store = "stored => { state.kind = 'x'; onpagehide = null;"
            store += "stored.id = location.hash.split('/')[1];"
            store += "sessionStorage.setItem('scratchlm', JSON.stringify(stored)) }"
            page.evaluate(store, {"kind": "chat", **stored})
            page.reload()
            ready(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def ready(page):
    expect(page.locator("#draft, #list label")).not_to_have_count(0)
    expect(page.locator("#send")).to_have_text(re.compile("Send|发送"))


def say(page, text):
    page.fill("#draft", text)
    page.press("#draft", "Enter")


def ask(page, text):
    """Send and wait for the answer; its text."""
    finished = page.locator("#log .answer .actions")  # a tool call has none
    before = finished.count()
    say(page, text)
    expect(finished).to_have_count(before + 1)
    return page.locator(ANSWERS).last.inner_text()


def test_the_first_screen_has_questions_of_the_run(chat, base, visit):
    page = visit(chat, viewport={"width": 390, "height": 844}, has_touch=True)
    expect(page.locator(".welcome")).to_contain_text(re.compile("chat.*12.*rows.jsonl.*search"))
    expect(page.locator("#draft")).not_to_be_focused()  # a keyboard would hide half of it
    questions = page.locator(".example")
    assert questions.all_inner_texts() == ASKED
    questions.nth(1).click()
    expect(page.locator("#log .user .text")).to_have_text(ASKED[1])
    page = visit(base)  # nothing is known of its run
    expect(page.locator(".welcome h1")).to_have_text("base")
    assert page.locator(".example").count() == 0


def test_conversations_are_kept_renamed_deleted_undone_and_exported(chat, visit):
    page = visit(chat, accept_downloads=True)
    titles, said = page.locator("#talks a"), page.locator("#log .user .text")
    answer = ask(page, "first")
    page.get_by_role("button", name="New").click()
    expect(said).to_have_count(0)
    ask(page, "second")
    expect(titles).to_have_text(["second", "first"])
    titles.last.click()
    page.once("dialog", lambda d: d.accept("Letters / 字母"))
    page.get_by_role("button", name="Rename: first").click()
    expect(titles.last).to_have_text("Letters / 字母")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON: Letters").click()
    assert download.value.suggested_filename == "Letters-字母.json"
    download.value.save_as("export.json")
    kind, examples = read_examples("export.json")
    assert kind == "chat" and examples[0]["messages"][1]["content"].strip() == answer.strip()
    page.get_by_role("button", name="Delete: Letters").click()
    expect(titles).to_have_text(["second"])
    expect(page.locator(".welcome")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(said).to_have_text("first")


def test_an_answer_grows_and_escape_stops_it(chat, visit):
    page = visit(chat)
    page.get_by_label("Max tokens", exact=True).fill("7000")
    say(page, "hello")
    growing = page.locator("#live .text")
    expect(growing).not_to_be_empty()
    early = growing.inner_text()
    expect(page.locator("#send")).to_have_text("Stop")
    expect(growing).not_to_have_text(early)
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator("#log .answer")).to_contain_text("Stopped")
    assert page.locator(ANSWERS).last.inner_text().strip().startswith(early.strip()[:20])


def test_regenerate_edit_and_reload(chat, visit):
    page = visit(chat)
    first = ask(page, "one")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(ANSWERS).last).not_to_have_text(first)
    expect(page.locator("#log article")).to_have_count(2)
    ask(page, "two")
    page.get_by_role("button", name="Edit").first.click()
    page.fill("#editor", "three")
    page.press("#editor", "Enter")
    expect(page.locator("#log article")).to_have_count(2)
    expect(page.locator("#log .user")).to_contain_text("three")
    text = ask(page, "four")
    page.fill("#draft", "half a thought")
    page.reload()
    expect(page.locator(ANSWERS).last).to_have_text(text)
    expect(page.locator("#draft")).to_have_value("half a thought")


def test_what_is_sent_has_the_settings_and_the_system_prompt(chat, visit):
    page = visit(chat)
    page.get_by_label("System prompt").fill("be kind")
    page.get_by_label("Temperature", exact=True).fill("0")
    expect(page.get_by_label("Seed", exact=True)).to_be_hidden()  # it would change nothing
    for name, value in (("Temperature", "0.5"), ("top_k", "7"), ("Seed", "11")):
        page.get_by_label(name, exact=True).fill(value)
    page.fill("#draft", "hi")
    page.dispatch_event("#draft", "keydown", {"key": "Enter", "isComposing": True})
    page.press("#draft", "Shift+Enter")  # neither of these sends
    assert page.input_value("#draft") == "hi\n" and page.locator("#log article").count() == 0
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "hi")
    body = request.value.post_data_json
    assert body["messages"] == [turn("system", "be kind"), turn("user", "hi")]
    found = [body[k] for k in ("temperature", "top_k", "seed", "stream", "logprobs")]
    assert found == [0.5, 7, 11, True, True]


def test_a_key_is_asked_for_once(chat, browser, monkeypatch):
    monkeypatch.setattr(chat.service, "key", "secret")
    with browser.new_context(locale="en-US") as context:
        page, asked_for = context.new_page(), []
        page.on("dialog", lambda d: (asked_for.append(d.message), d.accept("secret")))
        page.goto(chat.url)
        expect(page.locator("#draft")).to_have_attribute("placeholder", "Message")
        assert len(asked_for) == 1 and "API key" in asked_for[0]


def test_an_error_is_shown_and_a_busy_or_lost_server_is_asked_again(chat, visit):
    page, url = visit(chat), "**/v1/chat/completions"
    busy = {"status": 429, "headers": {"Retry-After": "1"}, "json": {"error": {"message": "full"}}}
    page.route(url, lambda r: r.fulfill(**busy), times=1)
    say(page, "hi")
    expect(page.locator("#banner")).to_contain_text("busy")
    expect(page.locator("#log .answer")).to_have_count(1)
    expect(page.locator("#banner")).to_be_hidden()
    page.route(url, lambda r: r.abort())
    cut = events({"content": "0"}).removesuffix("data: [DONE]\n\n")  # the server goes away
    page.route(url, lambda r: r.fulfill(body=cut, content_type="text/event-stream"), times=1)
    say(page, "hi")
    expect(page.locator("#banner")).to_contain_text("reached")
    page.unroute(url)
    expect(page.locator("#log .answer")).to_have_count(2)
    expect(page.locator("#banner")).to_be_hidden()
    assert "0" not in page.locator(ANSWERS).last.inner_text()
    error = {"error": {"message": "too long for me", "type": "x", "param": None, "code": None}}
    page.route(url, lambda r: r.fulfill(status=400, json=error), times=1)
    say(page, "hi")
    expect(page.get_by_role("alert").filter(has_text="too long for me")).to_be_visible()
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator("#log .answer")).to_have_count(3)


def events(*deltas, finish="stop", **more):
    """The body of a streamed answer."""
    chunks = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]} | more)
    return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"


def test_a_tool_call_is_made_shown_and_answered(chat, visit):
    page, bodies = visit(chat), []
    functions = [{"name": "search", "arguments": f'{{"rating_range_lower": {n}}}'} for n in (4, 3)]
    calls = [{"index": n, "id": f"c{n}", "type": "function", "function": function}
             for n, function in enumerate(functions)]  # fmt: skip
    first = {"reasoning_content": "Hm"}, {"reasoning_content": "."}, {"content": "I look."}
    usage = {"prompt_tokens": 8000, "completion_tokens": 192, "total_tokens": 8192}
    answers = iter([events(*first, {"tool_calls": calls}, finish="tool_calls"),
                    events({"content": "here"}, finish="length", usage=usage)])  # fmt: skip

    def answer(route):
        bodies.append(route.request.post_data_json)
        route.fulfill(body=next(answers), content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    assert ask(page, "a hotel") == "here"
    assert page.locator(".card th").all_inner_texts()[:3] == ["name", "price", "rating"]
    shown = page.locator("#log .answer").first.locator(".card, .text")  # the thought is folded
    firsts = [c.inner_text().split("\n")[0] for c in shown.all()]
    assert firsts == ["Thoughts", "I look.", "search: rating ≥ 4", "search: rating ≥ 3"]
    assert shown.first.locator("p").text_content() == "Hm."
    expect(page.locator("#log")).to_contain_text("context full (8192 tokens)")
    told = bodies[1]["messages"]
    assert [m["role"] for m in told] == ["user", "assistant", "tool", "tool"] and bodies[0]["tools"]
    assert [c["function"] for c in told[1]["tool_calls"]] == functions
    assert [m["tool_call_id"] for m in told[2:]] == [c["id"] for c in told[1]["tool_calls"]]
    assert (told[1]["content"], told[1]["reasoning_content"]) == ("I look.", "Hm.")


HOSTILE = """<img src=x onerror="document.title='hacked'"> <script>document.title='hacked'</script>

[click](javascript:document.title='hacked') [ok](https://example.com/)

```html
<b>not bold</b>
```

| a | b |
| - | - |
| <i>c</i> | **d** |

1. one
   - *two*
> quoted `<u>`
"""


def test_hostile_text_stays_text_and_markdown_is_shown(chat, visit):
    deep = turn("assistant", ">" * 20_000 + "\n" + "- " * 5_000)
    messages = [turn("user", "<b>hi</b>"), turn("assistant", HOSTILE), turn("user", "x"), deep]
    image, half = "<img src=x onerror=1>", "好".encode()
    parts = (image, image.encode()), ("\ufffd", half[:2]), ("\ufffd", half[2:])
    tokens = [{"text": t, "bytes": list(b), "logprob": -1, "top": []} for t, b in parts]
    messages[1] |= {"tokens": tokens, "seed": 1, "finish": "stop"}
    page = visit(chat, stored={"messages": messages})
    log = page.locator("#log")
    assert log.locator("img, script, b, i, u").count() == 0 and "hacked" not in page.title()
    assert log.locator("a").all_inner_texts() == ["ok"]
    shown = {"pre": "<b>not bold</b>", "td": "<i>c</i>", "td strong": "d", "ol ul em": "two"}
    for selector, text in (shown | {"blockquote code": "<u>"}).items():
        assert log.locator(selector).first.inner_text() == text
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator(".token")).to_have_text([image, "好"])  # joined to whole characters
    assert log.locator("img").count() == 0


def test_tokens_have_shades_and_alternatives_by_keyboard_too(chat, visit):
    page = visit(chat)
    text = ask(page, "hi")
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator(".token")).to_have_count(24)
    assert "".join(page.locator(".token").all_inner_texts()).strip() == text.strip()
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    alternatives = page.locator("#alternatives")
    expect(alternatives).to_be_visible()
    assert alternatives.locator("i").count() >= 5 and alternatives.locator("b.mono").count() == 1


def test_calls_are_chosen_among_drawn_until_they_differ(chat, visit):
    """Answers to the n-th question of a side: a call of the n-th price, or one without JSON."""
    page, bodies, prices = visit(chat, "#choose"), [], iter((1, 1, "{", 2, *[3] * 99))

    def answer(route):
        bodies.append(body := route.request.post_data_json)
        if body["messages"][-1]["role"] == "tool":
            return route.fulfill(body=events({"content": "so"}), content_type="text/event-stream")
        function = {"name": "search", "arguments": f'{{"price_range_upper": {next(prices)}}}'}
        call = {"index": 0, "id": f"{len(bodies)}", "type": "function", "function": function}
        sent = events({"tool_calls": [call]}, finish="tool_calls")
        route.fulfill(body=sent, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    page.get_by_label("Temperature", exact=True).fill("0")
    say(page, "cheap")
    expect(page.locator(".pair .card")).to_have_text([re.compile("≤ 1"), re.compile("≤ 2")])
    assert {body["temperature"] for body in bodies} == {0.8}
    with page.expect_response("**/page/choose") as response:
        page.keyboard.press("2")
    assert response.value.ok
    expect(page.locator("#count")).to_contain_text(re.compile("Choices: [1-9]"))
    expect(page.locator("#bar code")).to_contain_text("finetune.py")
    kind, (*_, row) = read_examples(CHOICES)
    assert kind == "prefer" and row["messages"] == [turn("user", "cheap")]
    for n, side in zip((2, 1), preference_rows(row, CHAT, 4096)):
        learned = CHAT.decode([i for i, m in zip(side.ids, side.mask) if m])
        assert re.search(f"search.*price_range_upper.*{n}.*so", learned)
    expect(page.locator("#log .card")).to_contain_text("≤ 2")
    say(page, "again")  # all further answers are equal
    expect(page.locator(".note")).to_contain_text("equal in 4 draws")


def write_run(name, steps, file_mode="w"):
    path = Path("out", name, "metrics.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, file_mode, encoding="utf-8") as file:
        for step in steps:
            row = dict(step=step, tokens=100 * step, seconds=step / 10, loss=3 / (1 + step), lr=0.1)
            rows = [row] + [{"step": step, "val_loss": 4 / (1 + step)}] * (step % 5 == 0)
            file.writelines(json.dumps(row) + "\n" for row in rows)


def test_runs_are_laid_over_each_other_and_grow_while_they_train(base, visit):
    write_run("old", range(1, 21))
    write_run("new", range(1, 6))
    Path("out/new/settings.json").write_text('{"objective": "sft"}')
    page = visit(base, "#runs")
    lines = page.locator("#loss polyline")
    expect(lines).to_have_count(4)  # training and evaluation of each
    assert page.locator("#figure polyline").count() == 2
    charts = page.locator("#loss figure").all_inner_texts()
    assert [text.split("\n")[0] for text in charts] == ["Loss: sft", "Loss: pretraining"]
    new, same, old, _ = [line.evaluate("l => getComputedStyle(l).stroke") for line in lines.all()]
    assert new == same != old
    labels = page.locator("#list label")
    before = labels.filter(has_text="new").inner_text()
    points = lines.first.get_attribute("points")
    write_run("new", range(6, 60), "a")
    expect(labels.filter(has_text="new")).not_to_have_text(before)
    expect(lines.first).not_to_have_attribute("points", points)  # the axis is longer
    page.focus("#loss svg")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#loss figcaption").first).to_contain_text(re.compile("step 5\\d.*step 5"))
    page.get_by_label("smoothing").fill("0.9")
    expect(page.locator("#loss .faint")).to_have_count(2)  # what was measured, behind the mean
    page.get_by_label("smoothing").fill("0")
    page.get_by_label("old").uncheck()
    expect(lines).to_have_count(2)


def test_a_base_model_completes_goes_on_and_has_choices_of_a_prompt(base, visit):
    page = visit(base)
    text = ask(page, "def ")
    page.get_by_role("button", name="Continue from here").click()
    assert page.input_value("#draft").startswith("def ")
    assert page.input_value("#draft")[4:].split() == text.split()
    page = visit(base, "#choose")
    say(page, "Once")
    expect(page.get_by_role("button", name="Better (1)")).to_be_visible()
    one, two = page.locator(".pair .text").all_inner_texts()
    with page.expect_response("**/page/choose"):
        page.get_by_role("button", name="Better (1)").click()
    row = json.loads(CHOICES.read_text(encoding="utf-8").splitlines()[-1])
    words = [row[k].split() for k in ("prompt", "chosen", "rejected")]
    assert words == [["Once"], one.split(), two.split()]


def test_a_classifiers_verdict_is_bars(critic, visit):
    page = visit(critic)
    say(page, "a fine film")
    expect(page.locator(".bars i")).to_have_count(2)
    assert sorted(page.locator(".bars .mono").all_inner_texts()) == ["neg", "pos"]
    assert page.get_by_role("button", name="Tokens").count() == 0


def test_every_word_of_the_page_is_in_both_languages():
    page = (ROOT / "data" / "page.html").read_text(encoding="utf-8")
    words = page[page.index("const TEXT = {") : page.index("const CHINESE")]
    words = words[: words.index("};")].replace('|" +\n    "', "|")
    pairs = re.findall(r'(\w+): "([^"|]+)\|([^"|]+)"', words)
    known = {key for key, english, chinese in pairs}
    assert len(pairs) == len(known) == words.count('"') / 2
    used = re.findall(r'\bt\("(\w+)"|data-(?:text|label)="(\w+)"', page)
    assert {a or b for a, b in used} <= known


def test_nothing_is_wider_than_a_phone_and_the_page_speaks_chinese(chat, visit):
    hotels = [{"name": "很长的名字" * 5, "price": 1, "address": "x" * 80}] * 2
    call = {"id": "c", "type": "function", "function": {"name": "search", "arguments": "x" * 200}}
    messages = [turn("user", "w" * 300), turn("assistant", None) | {"tool_calls": [call]}]
    messages.append(turn("tool", json.dumps(hotels)) | {"tool_call_id": "c"})
    messages.append(turn("assistant", f"```\n{'y' * 300}\n```") | {"finish": "stop", "seed": 1})
    dark = dict(locale="zh-CN", viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = visit(chat, stored={"messages": messages}, **dark)
    expect(page.locator("#draft")).to_have_attribute("placeholder", "输入消息")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    for view in ("#talk", "#choose", "#runs"):
        page.locator(f"nav a[href='{view}']").click()
        expect(page.locator("nav a[aria-current]")).to_have_attribute("href", view)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
    stacked = "td => getComputedStyle(td, '::before').content + getComputedStyle(td).display"
    assert page.locator(".card td").nth(1).evaluate(stacked) == '"价格 "block'
    page.locator("nav a").first.click()
    page.get_by_role("button", name="设置").click()
    expect(page.get_by_label("系统提示")).to_be_in_viewport()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background != "rgb(255, 255, 255)"


def test_digits_appear_step_by_step(chat, visit, monkeypatch):
    small = mnist.Denoiser(width=16, layers=1, heads=2)
    monkeypatch.setattr(chat.service, "draw", functools.partial(mnist.pictures, small))
    monkeypatch.setitem(chat.service.info, "draws", True)
    page = visit(chat)
    page.get_by_role("button", name="Draw digits").click()
    page.fill("#digits", "三 1")
    page.press("#digits", "Enter")
    expect(page.locator("#steps")).to_have_text("Step 30, from noise to digits")
    picture = page.locator("#picture")
    last = picture.get_attribute("src")
    page.locator("#frame").press("ArrowLeft")
    expect(picture).not_to_have_attribute("src", last)
    page.fill("#digits", "3x")
    page.press("#digits", "Enter")
    expect(page.locator("#steps")).to_contain_text("'x' is not a digit")
