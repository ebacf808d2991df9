"""What chat templates make of messages: every text arrives, in the form that the template takes, or it is said."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ptqtp_gguf.errors import ChatError, InputError
from ptqtp_gguf.llamacpp import fitted, keeps, read_template, render_template

USER = {"role": "user", "content": "What is it?"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAID = {"role": "assistant", "content": "A boat."}
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}"
PARTS = "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{{ c.text }}{% endfor %}.{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
DROPS = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}.{% endfor %}"


def shown(template: str, *messages: dict[str, Any], **more: Any) -> str:
    return render_template(template, messages, "<s>", "</s>", **more)


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content }}",
        "{{ m.content | trim }}",
        "{{ m['content'][0]['text'] }}",
        "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}",
        "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}",
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
        "{% if m.content is not string %}{{ m.content[0].text }}{% endif %}",
        "{% if m.role == 'system' %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
        "{% generation %}{{ m.content | strip }}{% endgeneration %}",
    ],
)
def test_texts_arrive_in_the_form_that_a_template_takes(content: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>" + content + ".{% endfor %}"
    want = "<system>Be brief..<user>What is it?.<assistant>A boat..<user>Really?."
    again = {"role": "user", "content": "Really?"}
    assert shown(template, SYSTEM, USER, SAID, again) == want
    listed = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (SYSTEM, USER, SAID, again)]
    assert shown(template, *listed) == want


@pytest.mark.parametrize("template", [REFUSES + PLAIN, REFUSES + PARTS, DROPS])
def test_a_system_message_that_is_not_taken_goes_to_the_first_user_s(template: str) -> None:
    want = "<user>Be brief.\nWhat is it?.<assistant>A boat..<user>What is it?."
    assert shown(template, SYSTEM, USER, SAID, USER) == want
    assert shown(template, USER) == "<user>What is it?."


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("Hello.", "the user says"),
        ("{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}", "the user says"),
        ("{{ messages[0].content }}", "the user says"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "the user says"),
        ("{% for m in messages %}{{ m.content[:4] }}{% endfor %}", "the user says"),
        ("{{ messages[-1].content }}", "the system says"),  # as it is no longer the next message
        ("{% for m in messages %}{{ m.content.split(' is ')[0] }}{% endfor %}", "a part of the message, from 'is' on"),
    ],
)
def test_a_text_that_is_left_out_is_said(template: str, lost: str) -> None:
    with pytest.raises(ChatError, match=rf"leaves out (what )?{lost}; give another with --chat-template FILE"):
        shown(template, SYSTEM, {"role": "user", "content": "Hello"}, SAID, USER)


@pytest.mark.parametrize("how", ["trim", "replace(' ', '  ')", "e", "upper", "tojson"])
def test_a_text_may_be_written_in_another_way(how: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | " + how + " }}{% endfor %}"
    assert shown(template, {"role": "user", "content": ' "Quite"\n<b> & it\u2019s '}).count("<user>") == 1


def test_what_a_template_is_told() -> None:
    asked = {**USER, "tool_calls": None}
    template = (
        "{{ bos_token }}{{ strftime_now('%Y') }}|{{ date_string }}|{{ datetime }}|{{ add_generation_prompt }}|"
        "{% if tools is defined or tools is not none or tools != none or functions %}tools{% endif %}|"
        "{{ 'x' + nothing + messages[0].tool_calls }}{{ nothing.at.all }}{{ messages[0].content }}{{ eos_token }}"
    )
    now = datetime.now()
    dates = f"{now:%Y}|{now:%d %b %Y}|{now:%b %d %Y}"
    assert shown(template, asked, answer=True) == f"<s>{dates}|True||xWhat is it?</s>"
    assert "|False|" in shown(template, asked)
    assert shown("{{ tools[0].name }}{{ messages[0].content }}", USER, tools=[{"name": "look"}]) == "lookWhat is it?"


def test_what_refuses_says_why() -> None:
    with pytest.raises(ChatError, match=r"refuses these messages: No system role; give another with"):
        shown(REFUSES + PLAIN, SYSTEM)
    with pytest.raises(ChatError, match=r"cannot be read: .*unknown tag 'endif'.*; give another with"):
        shown("{% for m in messages %}{{ m.content }}{% endif %}", USER)
    assert (
        shown("{{ messages.__class__.__mro__ }}{{ messages[0].content }}", USER) == "What is it?"
    )  # nothing of Python


def test_any_renderer_is_fitted() -> None:
    """transformers', too, by which a checkpoint's own template is read for calibration."""

    def render(messages: list[dict[str, Any]]) -> str:
        return "".join(c["text"] for m in messages for c in m["content"])

    assert fitted([USER, SAID], render) == "What is it?A boat."
    assert fitted([SYSTEM, USER], lambda messages: "Hello.", strict=False) == "Hello."
    last: Callable[[list[dict[str, Any]]], str] = lambda messages: str(messages[-1]["content"][0]["text"])  # noqa: E731
    assert fitted([SYSTEM, USER], last, strict=False) == "Be brief.\nWhat is it?"
    with pytest.raises(ChatError, match="refuses these messages: it makes nothing of them"):
        fitted([USER], lambda messages: "", strict=False)
    assert keeps([USER, SAID], "... what is it") and not keeps([USER, SAID], "What is") and keeps([SAID], "")
    only: Callable[[list[dict[str, Any]]], str] = lambda messages: str(messages[0]["content"])  # noqa: E731
    with pytest.raises(ChatError, match="leaves out what the assistant says"):
        fitted([USER, SAID], only)


def test_a_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("\ufeff" + PLAIN)
    assert read_template(path) == PLAIN
    for raw, message in (
        (b" \n", "it is empty"),
        (b"\xff", "not UTF-8"),
        (b"{% for", r"chat\.jinja: .* be read"),
    ):
        path.write_bytes(raw)
        with pytest.raises((InputError, ChatError), match=message):
            read_template(path)
    with pytest.raises(InputError, match="No such file"):
        read_template(tmp_path / "absent")
