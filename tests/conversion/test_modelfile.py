"""Ollama's templates say what the files' own do: as we read them, and by Go's text/template where it is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
from helpers import Cli, write_gguf
from talking_model import write_talking_model

from ptqtp_gguf.conversion import modelfile as made
from ptqtp_gguf.conversion.modelfile import Turns, turns_of
from ptqtp_gguf.llamacpp import install, render_template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (  # as Qwen2.5's
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
)
JOINED = (  # as Gemma's: what the system says begins the user's turn
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}{{ m.content }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
COUNTING = "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why {{ this }}?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2\n3"},
        {"role": "user", "content": "4"},
    ],
]
GO = """package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var cases []struct {
		Template string
		Messages []message
	}
	var out []string
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	for _, c := range cases {
		var b bytes.Buffer
		t := template.Must(template.New("").Parse(c.Template))
		if err := t.Execute(&b, map[string]any{"Messages": c.Messages}); err != nil {
			panic(err)
		}
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


def of(template: str) -> Turns | None:
    return turns_of(lambda m, answer: render_template(template, m, "<s>", "</s>", answer, strict=False))


def by_go(cases: Sequence[tuple[str, list[dict[str, str]]]], folder: Path) -> list[str]:
    program = folder / "main.go"
    program.write_text(GO)
    asked = json.dumps([{"Template": t, "Messages": m} for t, m in cases])
    done = subprocess.run(["go", "run", str(program)], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, JOINED], ids=["chatml", "default system", "joined"])
def test_constant_texts_are_found(template: str) -> None:
    turns = of(template)
    assert turns is not None
    for messages in MESSAGES:
        assert turns.render(messages) == render_template(template, messages, "<s>", "</s>", True)
    assert turns.joined == (template is JOINED)


@pytest.mark.parametrize("template", [COUNTING, "{{ messages[-1].content }}", "{{ raise_exception('no') }}"])
def test_other_templates_are_not_guessed(template: str) -> None:
    assert of(template) is None


def test_the_text_of_chatml() -> None:
    turns = of(CHATML)
    assert turns is not None and turns.go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )


@pytest.mark.skipif(not shutil.which("go"), reason="no Go here")
def test_go_says_the_same(tmp_path: Path) -> None:
    cases = [(t, m) for t in (CHATML, DEFAULT_SYSTEM, JOINED) for m in MESSAGES]
    turns = [(of(t), m) for t, m in cases]
    found = by_go([(t.go(), m) for t, m in turns if t], tmp_path)
    assert found == [render_template(t, m, "<s>", "</s>", True) for t, m in cases]


@pytest.mark.runtime
def test_templates_of_models(tmp_path: Path) -> None:
    """Those that llama.cpp brings: what is found says the same of other messages too; by Go as well, where it is."""
    folder = install.package_dir() / "convert" / "models" / "templates"
    found = {}
    for path in sorted(folder.glob("*.jinja")):
        if turns := of(path.read_text(encoding="utf-8")):
            found[path.name] = turns
    assert {"google-gemma-2-2b-it.jinja", "Qwen-Qwen2.5-7B-Instruct.jinja"} <= set(found)
    cases = [(name, m) for name in found for m in (MESSAGES[0], *([MESSAGES[2]] if found[name].system[0] else []))]
    want = [render_template((folder / n).read_text(encoding="utf-8"), m, "<s>", "</s>", True) for n, m in cases]
    assert [found[n].render(m) for n, m in cases] == want
    if shutil.which("go"):
        plain = [i for i, (n, _) in enumerate(cases) if "{{" not in found[n].render(MESSAGES[0])]
        assert by_go([(found[cases[i][0]].go(), cases[i][1]) for i in plain], tmp_path) == [want[i] for i in plain]


def test_sampling_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_token_list(["<s>", "</s>", "<|im_end|>"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(1)
    writer.add_chat_template("{{ bos_token }}" + CHATML)
    writer.add_float32("general.sampling.temp", 0.7)
    writer.add_int32("general.sampling.top_k", 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text, why = made.modelfile(path)
    assert why == "" and text.startswith('FROM ./m.gguf\nTEMPLATE """{{ range .Messages }}')  # Ollama adds <s> itself
    after = text.rpartition('"""')[2].strip().splitlines()
    assert after == [
        "PARAMETER temperature 0.7",
        "PARAMETER top_k 20",
        "PARAMETER num_ctx 2048",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "</s>"',
    ]


@pytest.mark.runtime
def test_the_command(cli: Cli, tmp_path: Path) -> None:
    model, ours, twin = write_talking_model(tmp_path / "m.gguf"), tmp_path / "ours.gguf", tmp_path / "twin.gguf"
    assert cli("convert", str(model), str(ours), "--effort", "none").returncode == 0
    done = cli("export-q4_0", str(ours), str(twin), "--ollama")
    assert done.returncode == 0 and "ollama create NAME -f" in done.stdout
    text = (tmp_path / "twin.Modelfile").read_text()
    assert text.startswith("FROM ./twin.gguf\n")
    twin.unlink()
    again = cli("export-q4_0", str(ours), str(twin), "--ollama")
    assert again.returncode == 1 and re.search(r"twin\.Modelfile: exists already; use --force", again.stderr)
    assert not twin.exists()
    assert cli("export-q4_0", str(ours), str(twin), "--ollama", "--force").returncode == 0


def test_a_file_without_a_template(tmp_path: Path) -> None:
    import numpy as np

    path = write_gguf(tmp_path / "m.gguf", {"blk.0.a.weight": np.zeros((2, 32), np.float32)})
    assert made.modelfile(path) == ("FROM ./m.gguf\n", "")
