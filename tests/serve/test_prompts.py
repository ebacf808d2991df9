"""`chat` sends what llama-server would send: the same prompt for the same messages, whatever a template looks like."""

from __future__ import annotations

import json
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from talking_model import write_talking_model

from ptqtp_gguf.errors import ChatError, ServerError
from ptqtp_gguf.llamacpp import chat_template, encode, generate, load
from ptqtp_gguf.serve import Chat, Server

pytestmark = pytest.mark.runtime
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " what is it? \u00e9"}
SAID = {"role": "assistant", "content": "a boat"}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, SAID, USER], [SYSTEM, USER, SAID, USER]]
EACH = "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{}<|im_end|>{{% endfor %}}<|im_start|>assistant\n"
PARTS = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
TOOLS = "{% if tools is defined and tools is not none %}TOOLS {{ tools | tojson }}{% endif %}"
NOT_THINKING = "{% if enable_thinking is defined and enable_thinking is false %}"
TEMPLATES = {
    "plain": EACH.format("{{ m.content }}"),
    "bos": "{{ bos_token }}" + EACH.format("{{ m.content | trim }}{{ eos_token }}"),
    "parts": EACH.format(PARTS),
    "first part": EACH.format("{{ m['content'][0]['text'] }}"),
    "chosen parts": EACH.format(
        "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join }}"
    ),
    "both": EACH.format("{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"),
    "tools": TOOLS + EACH.format("{{ m.content }}{% for t in m.tool_calls %}{{ t.function.name }}{% endfor %}"),
    "generation": EACH.format("{% generation %}{{ m.content }}{% endgeneration %}"),
    "date": "{{ strftime_now('%Y') }} {{ date_string }}" + EACH.format("{{ m.content }}"),
    "no system": EACH.format("{% if m.role == 'system' %}{{ raise_exception('No system') }}{% endif %}{{ m.content }}"),
    "system dropped": "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "turns": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns!') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "thinks": EACH.format(
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    )
    + "{% if enable_thinking %}<think>{% endif %}",
    "thinks unless told": EACH.format("{{ m.content }}")
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "lenient": EACH.format("{{ 'a ' + m.content + m.absent + none }}{{ absent.more }}"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_llama_server_s(name: str, tmp_path: Path) -> None:
    path = write_talking_model(tmp_path / "m.gguf", TEMPLATES[name])
    with Server(path, ctx=64, threads=1) as server:
        theirs = []
        for messages in CONVERSATIONS:
            body = json.dumps({"messages": messages}).encode()
            with urllib.request.urlopen(server.url + "/apply-template", body) as reply:
                theirs.append(json.load(reply)["prompt"])
    with closing(load(path, n_ctx=64)) as model:
        template = chat_template(model)
        assert template
        ours = [template(messages) for messages in CONVERSATIONS]
        tokens = [encode(model, prompt) for prompt in ours]
        # llama-server leaves out what the tokenizer puts there
        assert [prompt.removeprefix("<s>") for prompt in ours] == theirs
        assert all(ids.count(model.token_bos()) == 1 for ids in tokens) or "bos" in name
        assert [encode(model, prompt) for prompt in theirs] == tokens
    assert all("what is it?" in prompt for prompt in ours) and "Be brief." in ours[1]


def test_a_chat_with_a_template_that_wants_parts(tmp_path: Path) -> None:
    """Also by llama-cpp-python's own function for chats."""
    with closing(load(write_talking_model(tmp_path / "m.gguf", TEMPLATES["parts"]), n_ctx=128)) as model:
        chat = Chat(model, system="be brief", temperature=0, max_tokens=4)
        answer = "".join(chat.ask("what is it"))
        assert len(answer) == 4
        want = "<|im_start|>system\nbe brief<|im_end|><|im_start|>user\nwhat is it<|im_end|><|im_start|>assistant"
        prompt = encode(model, want)
        assert model._input_ids.tolist()[: len(prompt)] == prompt
        model.reset()
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is it"}]
        made = model.create_chat_completion(messages, temperature=0, max_tokens=4)
        assert model._input_ids.tolist()[: len(prompt)] == prompt
        assert made["usage"]["prompt_tokens"] == len(prompt)


def test_a_template_that_cannot_be_read_is_needed_by_chats_only(tmp_path: Path) -> None:
    path = write_talking_model(tmp_path / "m.gguf", "{% for m in messages %}{{ m.content }}{% endif %}")
    (tmp_path / "mine.jinja").write_text(TEMPLATES["plain"])
    with closing(load(path, n_ctx=128)) as model:
        assert len("".join(generate(model, "hello", max_tokens=3, temperature=0, seed=1))) == 3
        with pytest.raises(ChatError, match=r"m\.gguf: the chat template cannot be read: .*'endif'.*--chat-template F"):
            Chat(model)
        with pytest.raises(ChatError, match="the chat template cannot be read"):
            model.create_chat_completion([USER])
        assert "".join(Chat(model, template=TEMPLATES["plain"], max_tokens=3).ask("hello"))
    with pytest.raises(ServerError, match=r"cannot read the chat template: .*endif.*--chat-template-file FILE"):
        Server(path, ctx=64, threads=1).start()
    with Server(path, ctx=64, threads=1, chat_template_file=tmp_path / "mine.jinja") as server:
        body = json.dumps({"messages": [USER]}).encode()
        with urllib.request.urlopen(server.url + "/apply-template", body) as reply:
            assert USER["content"] in json.load(reply)["prompt"]


def test_a_template_that_loses_the_message(tmp_path: Path) -> None:
    with closing(load(write_talking_model(tmp_path / "m.gguf", "I know already."), n_ctx=64)) as model:
        chat = Chat(model)
        with pytest.raises(ChatError, match="leaves out what the user says; give another with --chat-template FILE"):
            next(chat.ask("hello"))
        assert not chat.turns
