"""sample.py with a fine-tuned model: labels, tools and the chat in the terminal."""

import functools
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ASSISTANT, BYTE, CALL, CHAT, END, ROOT, SYSTEM, TOOL, USER, render_chat, turn
from test_finetune_runs import small_model
from test_templates import pair

import lora
import model as lm
import sample
from data.batches import chat_rows
from data.chat import get_template
from data.cli import UserError
from data.rows import to_example
from data.tokenizer import REWARD_TOKEN, label_token
from data.tools import function_schema, load_tools

STOP = object()  # in a script: the user presses Ctrl-C here
SQUARE = {"square": lambda x: x * x}


def save(path, model, tokenizer):
    content = {"config": asdict(model.config), "model": model.state_dict(), "step": 0}
    Path(path).parent.mkdir(exist_ok=True)
    lm.save_checkpoint(path, content | {"tokenizer": tokenizer.spec})


def test_a_classifier_prints_probabilities_best_first_and_does_not_chat(tmp_path, capsys):
    names = ("neg", "<|x|>")
    model, tokenizer = small_model(context=32), BYTE.with_special(map(label_token, names))
    prompts = [torch.randint(256, (n,)).tolist() for n in (5, 1, 24, 7, 24, 2)]
    goals = [300, 257, 12]
    alone = torch.stack([model(torch.tensor([p]))[0, -1, goals].log_softmax(-1) for p in prompts])
    for batch in (1, 4, 64):
        assert (sample.classify(model, prompts, goals, batch) - alone).abs().max() < 1e-5
    save(tmp_path / "m.pt", model, tokenizer)
    sample.main(["--ckpt", str(tmp_path / "m.pt"), "--prompt", "fine", "--prompt", "x" * 90])
    lines = capsys.readouterr().out.splitlines()
    for first, p, second, q in map(str.split, lines):
        assert {first, second} == set(names) and float(p) >= float(q) and len(lines) == 2
        assert float(p) + float(q) == pytest.approx(1, abs=0.002)
    for token, said in ((label_token("neg"), "classifier of neg"), (REWARD_TOKEN, "a reward m")):
        save(tmp_path / "m.pt", model, BYTE.with_special([token]))
        with pytest.raises(UserError, match=said):
            sample.main(["--ckpt", str(tmp_path / "m.pt"), "--chat"])
    save(tmp_path / "m.pt", model, CHAT)
    sample.main(["--ckpt", str(tmp_path / "m.pt"), "--prompt", "fine", "--max_new_tokens", "1"])
    assert "--chat asks it" in capsys.readouterr().err


def say(text):
    return [*CHAT.encode(text), END]


@pytest.fixture
def script(monkeypatch):
    """script(turn, ...): the ids that the model will give, turn by turn; returns what it saw."""
    turns, seen = [], []

    def generate(model, prompts, max_tokens, *, seed, allowed, stop, **settings):
        seen.append(SimpleNamespace(prompt=prompts[0], allowed=allowed, seed=seed))
        assert len(prompts[0]) + max_tokens <= model.config.context
        for i in turns.pop(0)[:max_tokens]:
            if i is STOP:
                raise KeyboardInterrupt
            yield [i]
            if stop(0, i):
                return

    monkeypatch.setattr(sample, "generate", generate)
    return lambda *more: turns.extend(more) or seen


@pytest.fixture
def hear(monkeypatch, capsys):
    """hear(bot, *lines): what the terminal shows when a user types these lines."""

    def talk(bot, *lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        sample.talk(bot)
        return capsys.readouterr()

    return talk


def chat(tools=None, context=1024, tokenizer=CHAT, **settings):
    model = small_model(context=context, vocab_size=max(320, tokenizer.n_vocab))
    return sample.make_chat(model, tokenizer, tools, **settings)


def told(bot, *messages):
    """The ids of messages, where a model is told of its tools first."""
    return render_chat(messages, CHAT, tools=bot.schemas)[0]


def test_words_and_calls_are_made_their_results_fed_back_and_then_the_model_speaks(script, hear):
    turns = [*CHAT.encode("I look."), CALL, *CHAT.encode('square {"x": 2}')]
    seen = script([*turns, CALL, *say('square {"x": 3}')], say("4 and 好"))
    bot = chat(SQUARE, seed=5)
    out = hear(bot, "how much?").out
    assert out == 'I look.\n-> square {"x": 2}\n<- 4\n-> square {"x": 3}\n<- 9\n4 and 好\n'
    question, called, *results, _ = bot.messages
    assert called["content"] == "I look." and [m["content"] for m in results] == ["4", "9"]
    assert [m["tool_call_id"] for m in results] == [c["id"] for c in called["tool_calls"]]
    assert seen[0].prompt == [*told(bot, question), ASSISTANT]
    assert seen[1].prompt == [*told(bot, *bot.messages[:4]), ASSISTANT]
    assert [s.seed for s in seen] == [5, 6]
    assert all(s.allowed[[CALL, END]].all() for s in seen)
    assert not any(s.allowed[[SYSTEM, USER, ASSISTANT, TOOL, CHAT.eos_id, 300]].any() for s in seen)


def test_tools_are_told_at_the_end_of_the_system_turn(script, hear, tmp_path):
    seen = script(*[say("hi")] * 4)
    bot = chat(SQUARE)
    hear(bot, "/system be kind", "a", f"/save {tmp_path}/s.jsonl")
    schema = json.dumps([function_schema("square", SQUARE["square"])], ensure_ascii=False)
    wanted = f"<|system|>be kind\n{schema}<|end|><|user|>a<|end|><|assistant|>"
    assert CHAT.decode(seen[0].prompt) == wanted
    _, example = to_example(json.loads((tmp_path / "s.jsonl").read_text()))
    ids = chat_rows(example, CHAT, 1000)[0].ids  # what was told is what is learned
    assert ids[: len(seen[0].prompt)] == seen[0].prompt
    weather = {"weather": functools.partial(lambda city, day: city, day=1)}
    for tools in load_tools("hotel"), weather, None:
        hear(chat(tools), "a")
    hotel, weather, _ = (CHAT.decode(s.prompt) for s in seen[1:])
    assert hotel == "<|user|>a<|end|><|assistant|>"  # the model knows its tool by training
    assert '"name": "weather"' in weather and not seen[3].allowed[CALL]


def test_a_broken_call_goes_back_as_an_error_and_after_three_the_model_has_to_speak(script, hear):
    calls = 'square {"x": ', 'cube {"x": 2}', 'square {"x": 2}'
    seen = script(*([CALL, *say(call)] for call in calls), say("4"), say("again"))
    bot = chat(SQUARE)
    assert hear(bot, "a", "b").out.endswith("\n4\nagain\n")
    results = [json.loads(m["content"]) for m in bot.messages if m["role"] == "tool"]
    assert "not JSON" in results[0]["error"] and "cube" in results[1]["error"] and results[2] == 4
    assert [bool(s.allowed[CALL]) for s in seen] == [True, True, True, False, True]


def test_a_thought_is_kept_apart_and_what_a_template_refuses_is_told(script, hear):
    ours, gemma = pair("qwen3")[0], pair("gemma")[0]
    script(get_template(ours).encode("<think>\nHm\n</think>\n\nHi<|im_end|>"))
    bot = chat(tokenizer=ours)
    assert hear(bot, "a").out == "Hm\n\nHi\n"
    assert bot.messages[1] == turn("assistant", "Hi") | {"reasoning_content": "Hm"}
    script(*[gemma.encode("Hi")] * 2)
    bot = chat(SQUARE, tokenizer=gemma)
    assert "no place for tools" in bot.tools_problem()
    assert "System role not supported" in hear(bot, "/system be kind", "a", "/system", "b").err
    assert bot.messages == [turn("user", "b"), turn("assistant", "Hi")]


def test_ctrl_c_stops_the_answer_and_within_a_call_the_turn(script, hear):
    def slow():
        raise KeyboardInterrupt

    half = [SYSTEM, *CHAT.encode("好")[:2]]  # neither is shown
    seen = script([*CHAT.encode("half an"), *half, STOP], [CALL, *CHAT.encode("sl"), STOP],
                  [CALL, *say("slow {}")], say("hi"))  # fmt: skip
    bot = chat({"slow": slow})
    out = hear(bot, "a", "b", "c", "/reset", "d").out
    assert out.startswith("half an [stopped]\n") and out.count("[stopped") == 3
    turns = [turn("user", "a"), turn("assistant", "half an"), turn("user", "c")]
    assert seen[2].prompt == [*told(bot, *turns), ASSISTANT]
    assert bot.messages == [turn("user", "d"), turn("assistant", "hi")]


def test_commands(script, hear, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = script(say("one"), say("two"), say("three"))
    bot = chat(seed=0)
    out = hear(bot, "/retry", "/system 要友好", "\ufeffq", "/retry", "/save talk.json",
               "/save no/x.json", "/adapter poet", "/nonsense", "/reset", "r", "/system", "",
               "/quit", "never read").out  # fmt: skip
    assert bot.messages == [turn("user", "r"), turn("assistant", "three")]
    system = turn("system", "要友好")
    prompt = [*told(bot, system, turn("user", "q")), ASSISTANT]
    assert seen[0].prompt == seen[1].prompt == prompt and seen[0].seed != seen[1].seed
    assert seen[2].prompt == [*told(bot, system, turn("user", "r")), ASSISTANT]
    saved = json.loads(Path("talk.json").read_text(encoding="utf-8"))["messages"]
    assert saved == [system, turn("user", "q"), turn("assistant", "two")]
    for text in ("nothing has been asked", "saved to talk.json", "No such file or directory: 'no/x",
                 "no adapter", "/reset forgets", "forgotten", "system message: none"):
        assert text in out, text


def test_adapters_are_switched_in_the_middle_of_a_talk(script, hear):
    model, active = small_model(context=1024), []
    for name in ("poet", "clerk"):
        lora.add_lora(model, name=name)
    lora.set_adapter(model, "poet")
    script(*[say("x")] * 3)
    bot = sample.make_chat(model, CHAT)
    answer, layer = bot.answer, next(iter(lora.adapted(model).values()))
    bot.answer = lambda show: (active.append(layer.active), answer(show))
    out = hear(bot, "a", "/adapter clerk", "b", "/adapter", "/adapter none", "c").out
    assert active == ["poet", "clerk", None]
    assert out.count("adapters: poet, clerk (active), none") == 2 and "none (active)" in out


def test_a_full_context_is_cut_at_turns_and_said_once(script, hear):
    seen = script(*[say("y" * 10)] * 6)
    bot = chat(context=96, max_tokens=1000)
    assert hear(bot, "/system short", *["x" * 12] * 6).err.count("the context is full") == 1
    assert all(s.prompt[:7] == told(bot, turn("system", "short")) for s in seen)
    assert len(seen[-1].prompt) < len(told(bot, *bot.messages[:-1]))
    with pytest.raises(UserError, match="no chat template"):
        chat(tokenizer=BYTE)


def test_a_chat_from_a_pipe_ends_with_it(tmp_path):
    save(tmp_path / "m.pt", small_model(context=256), CHAT)
    flags = ["--ckpt", tmp_path / "m.pt", "--chat", "--tools", "hotel", "--max_new_tokens", 8]
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, flags)]
    stdin = b"\xff\xfe\n" + ("x" * 300 + "你好\n\n/retry\n/reset\n").encode()
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=60, env=env)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0 and "UTF-8" in err and "Traceback" not in err
    assert "Ctrl-C stops" in err and "<|" not in out
