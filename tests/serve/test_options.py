"""What llama-server can do besides: embeddings, reranking, adapters, a draft, grammars, and options as they are."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from talking_model import write_adapter, write_talking_model

from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import InputError, PtqtpError, ServerError
from ptqtp_gguf.llamacpp import adapter
from ptqtp_gguf.serve import Server
from ptqtp_gguf.serve.options import prefix

pytestmark = pytest.mark.runtime
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    conversion.convert(write_talking_model(folder / "f32.gguf"), folder / "ours.gguf")
    write_adapter(folder / "lora.gguf")
    (folder / "yes.gbnf").write_text('root ::= "yes"')
    (folder / "ab.json").write_text('{"type": "object", "properties": {"a": {"const": "b"}}, "required": ["a"]}')
    (folder / "mine.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    (folder / "empty").write_text("")
    return folder


def serving(folder: Path, ctx: int = 256, **more: Any) -> Server:
    return Server(folder / "ours.gguf", ctx=ctx, threads=1, **more)


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    with urllib.request.urlopen(server.url + path, json.dumps(body).encode(), timeout=120) as reply:
        return json.load(reply)


def answer(server: Server) -> str:
    return str(post(server, "/v1/chat/completions", CHAT)["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def usual(folder: Path) -> str:
    with serving(folder) as server:
        with pytest.raises(urllib.error.HTTPError, match="501"):
            post(server, "/v1/embeddings", {"input": "hello"})
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(server.url + "/slots")
        return answer(server)


def test_embeddings(folder: Path) -> None:
    texts = ["hello", "goodbye", "word " * 150]  # the last: more tokens than llama-server computes at once
    found = {}
    for pooling in (None, "mean", "last"):
        with serving(folder, ctx=1024, embeddings=True, pooling=pooling) as server:
            data = post(server, "/v1/embeddings", {"input": texts})["data"]
            found[pooling] = np.array([d["embedding"] for d in data])
    assert found["mean"].shape == (3, 64) and np.allclose(np.linalg.norm(found["mean"], axis=1), 1, atol=1e-4)
    assert np.array_equal(found[None], found["mean"])  # the file does not say how
    cosines = found["mean"] @ found["mean"].T
    assert cosines[np.triu_indices(3, 1)].max() < 0.98
    assert np.abs(found["mean"] - found["last"]).max() > 0.05


def test_reranking(folder: Path) -> None:
    with serving(folder, reranking=True) as server:
        found = post(server, "/v1/rerank", {"query": "hello", "documents": ["abc", "hello", "zz"]})["results"]
    scores = [r["relevance_score"] for r in found]
    assert sorted(r["index"] for r in found) == [0, 1, 2] and scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3


def test_adapters(folder: Path, usual: str) -> None:
    lora = adapter(str(folder / "lora.gguf"))
    with serving(folder, lora=[lora]) as server:
        whole = answer(server)
        assert post(server, "/v1/completions", {"prompt": "hi", "max_tokens": 1})["choices"]
    with serving(folder, lora=[(lora[0], 0.25), (lora[0], 0.75)]) as server:
        assert answer(server) == whole != usual
    with serving(folder, lora=[(lora[0], 0.0)]) as server:
        assert answer(server) == usual


def test_a_draft_changes_the_speed_only(folder: Path, usual: str) -> None:
    with serving(folder, draft=folder / "f32.gguf") as server:
        made = post(server, "/v1/chat/completions", CHAT)
    assert made["choices"][0]["message"]["content"] == usual
    assert made["timings"]["draft_n"] >= made["timings"]["draft_n_accepted"] > 0


def test_grammars_hold_for_every_request(folder: Path) -> None:
    with serving(folder, grammar=folder / "yes.gbnf", slots=True) as server:
        assert answer(server) == answer(server) == "yes"
        with urllib.request.urlopen(server.url + "/slots") as reply:
            assert len(json.load(reply)) == 1
    with serving(folder, json_schema=folder / "ab.json") as server:
        assert json.loads(answer(server)) == {"a": "b"}


def test_a_chat_template_of_its_own(folder: Path) -> None:
    with serving(folder, chat_template_file=folder / "mine.jinja", options=["--api_prefix", "/here"]) as server:
        assert server.url.endswith("/here")
        assert post(server, "/apply-template", CHAT)["prompt"] == "[hi]"


def test_options_are_passed_on(folder: Path, tmp_path: Path) -> None:
    with serving(folder, options=["--no-warmup", "--metrics"], log=tmp_path / "log") as server:
        assert answer(server)
        with urllib.request.urlopen(server.url + "/metrics") as reply:
            assert b"llamacpp:" in reply.read()
    for options, why in (
        (["--absent"], "invalid argument: --absent"),
        (["--cache-ram"], 'error while handling argument "--cache-ram": expected value'),
    ):
        with pytest.raises(ServerError, match=f"llama-server ended with exit code 1: {why}"):
            serving(folder, options=options).start()


@pytest.mark.parametrize("option", ["--host", "--port", "--api_key", "--api-key-file", "-m", "--hf-repo=x", "--alias"])
def test_options_that_are_not_passed_on(folder: Path, option: str) -> None:
    name = option.partition("=")[0].replace("_", "-")
    with pytest.raises(ServerError, match=f"^{name}: is not passed on to llama-server; "):
        serving(folder, options=["--no-warmup", option, "x"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"embeddings": True, "pooling": "most"}, "--pooling most: unknown; give one of none, mean"),
        ({"pooling": "mean"}, "give --embeddings, too"),
        ({"embeddings": True, "reranking": True}, "start two servers"),
        ({"draft": "absent"}, "absent: No such file"),
        ({"draft": "lora.gguf"}, "lora.gguf: no model to draft with, but of the kind 'adapter'"),
        ({"chat_template_file": "absent"}, "absent: No such file"),
        ({"chat_template_file": "empty"}, "empty: is empty"),
        ({"grammar": "absent"}, "absent: No such file"),
        ({"grammar": "ab.json"}, "ab.json: the runtime does not take the grammar: "),
        ({"json_schema": "yes.gbnf"}, "yes.gbnf: cannot be read as a JSON schema"),
        ({"grammar": "yes.gbnf", "json_schema": "ab.json"}, "give one of them"),
    ],
)
def test_what_is_refused_before_it_starts(folder: Path, more: dict[str, Any], message: str) -> None:
    files = {
        k: folder / v if k in ("draft", "chat_template_file", "grammar", "json_schema") else v for k, v in more.items()
    }
    with pytest.raises(PtqtpError, match=message):
        serving(folder, **files)
    with pytest.raises(ServerError, match="llama-server wants a name without commas"):
        serving(folder, lora=[(folder / "a,b.gguf", 1.0)])


def test_an_adapter_of_another_model(folder: Path) -> None:
    narrow = write_adapter(folder / "narrow.gguf", width=32)
    with pytest.raises(ServerError, match=r"exit code 1: failed to apply lora adapter: .* has incorrect shape"):
        serving(folder, lora=[adapter(str(narrow))]).start()
    with pytest.raises(InputError, match="no LoRA adapter"):
        adapter(str(folder / "ours.gguf"))


def test_prefix() -> None:
    assert prefix(["--api-prefix"]) == prefix([]) == "" and prefix(["-x", "--api_prefix", "/a"]) == "/a"
