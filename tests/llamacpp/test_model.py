"""The patched runtime, on real files: checkpoint to text, logits against float64, and what must be refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO
from reference_llama import Llama as Reference

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.codec.unit import POW5
from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import CheckpointError, InputError, OutputError, RuntimeMissing
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.llamacpp import model as runtime
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.quantize.methods import find, quantize
from ptqtp_gguf.serve.server import Server
from ptqtp_gguf.source import checkpoint

pytestmark = pytest.mark.runtime
TEXT = "The tide table on the harbour wall is printed every December by the same small firm."


def tool(name: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(install.tool(name)), *map(str, args)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        env={**os.environ, **(env or {})},
    )


def logits_of(path: Path, tokens: list[int]) -> np.ndarray:
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, type_k=f32, type_v=f32, n_threads=2)
    model.eval(tokens)
    out = np.array(model.scores[: len(tokens)], np.float64)
    model.close()
    return out


def tokens_of(path: Path) -> list[int]:
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokens = model.tokenize(TEXT.encode())
    model.close()
    return tokens


# ---- the whole path ----


def test_checkpoint_to_text(cli, demo_files: dict[str, Path]) -> None:
    with Reader(demo_files["ours"]) as r:
        matrices = [t for t in r.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        assert len(matrices) == 210 and {t.type_name for t in matrices} == {"TP2_1"}
        assert {t.shape[0] for t in matrices} == {576, 1536}
    done = cli("run", demo_files["ours"], "-p", "The capital of France is", "-n", "12", "--temp", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is") and len(done.stdout.split()) > 8
    # plain llama-cpp-python, nothing of ours imported: the same greedy text
    code = (
        "import sys; from llama_cpp import Llama;"
        f"m = Llama({str(demo_files['ours'])!r}, n_ctx=2048, verbose=False);"
        "print('The capital of France is' + m('The capital of France is', max_tokens=12, temperature=0)"
        "['choices'][0]['text']); assert 'ptqtp_gguf' not in sys.modules"
    )
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert plain.stdout.split() == done.stdout.split()


def test_chat_and_serve_answer(cli, demo_files: dict[str, Path]) -> None:
    question = "What is the capital of France?"
    done = cli("chat", demo_files["ours"], "-p", question, "--temp", "0", "-n", "12")
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
    with Server(demo_files["ours"], ctx=256) as server:
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 12}
        with urllib.request.urlopen(server.url + "/v1/chat/completions", json.dumps(body).encode()) as reply:
            assert "Paris" in json.load(reply)["choices"][0]["message"]["content"]


def test_two_pass_equals_the_kept_intermediate(demo_files: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint and its bf16 GGUF give the same bytes: the converter adds nothing of the moment."""
    conversion.convert(demo_files["bf16"], tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == demo_files["ours"].read_bytes()


def test_random_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    summary = conversion.convert(tiny_checkpoint, out)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
    assert summary.weights_by_type()["TP2_1"] == 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 192)


# ---- logits ----


@pytest.mark.parametrize("kind", ["TP2_1", "TP2_0"])
def test_logits_against_float64(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """The runtime against "dequantize and multiply" in float64.

    Tolerance, derived: the runtime differs from exact arithmetic by the rounding of activations to Q8_0, which the
    reference can do too. So the distance to the reference with rounded activations must be a small part of the effect
    of the rounding itself (what is left: float32 sums, and activations that fall on the other side of a tie).
    One of those among 128 inputs is a third of the effect, so they must be rare: an embedding in Q8_0 has none in the
    first layer, as its rows lie on the codes; in Q4_0 they are eighths of their largest, and 127 * 4/8 is a tie.
    """
    path = tmp_path / "m.gguf"
    conversion.convert(tiny_checkpoint, path, Options(type=kind, tensor_types=("token_embd=Q8_0",)))
    tokens = tokens_of(path)[:20]
    reference = Reference(path)
    exact, rounded = reference.logits(tokens), reference.logits(tokens, "rounded")
    got = logits_of(path, tokens)
    effect = np.sqrt(((rounded - exact) ** 2).mean())
    assert 1e-4 < effect / exact.std() < 0.05  # the reference itself: rounding matters, and only a little
    assert np.sqrt(((got - rounded) ** 2).mean()) < 0.2 * effect
    assert np.sqrt(((got - exact) ** 2).mean()) < 1.2 * effect


def test_logits_of_the_real_model(demo_files: dict[str, Path]) -> None:
    """30 layers deep, ties fall differently and spread, so the bound is the rounding's own effect."""
    tokens = tokens_of(demo_files["ours"])[:16]
    reference = Reference(demo_files["ours"])
    exact, rounded = reference.logits(tokens), reference.logits(tokens, "rounded")
    effect = np.sqrt(((rounded - exact) ** 2).mean())
    for file in ("ours", "twin"):
        got = logits_of(demo_files[file], tokens)
        assert np.sqrt(((got - exact) ** 2).mean()) < 1.5 * effect
        assert (got.argmax(axis=1) == exact.argmax(axis=1)).mean() > 0.9


WINDOWS = ["-f", str(REPO / "tools" / "fixtures" / "sample.txt"), "-c", "128", "--chunks", "3", "-t", "2"]

# Two correct kernels sum floats in different orders, some activations then round to the neighbouring Q8_0 code, and 30
# layers spread that. Rounding all weights to Q8_0 moves the logits by a mean KLD of .004 on this model, TP2_1 by .6:
# what different summing does must lie below the first.
SAME_LOGITS = 0.004
# Panels round activations with a float scale, rows and the twin with Q8_0's fp16 one: two roundings, independent.
OTHER_ROUNDING = 2 * SAME_LOGITS


def mean_kld(a: Path, b: Path, folder: Path, *args: str, env: dict[str, str] | None = None) -> tuple[float, str]:
    """Mean KL divergence of b's logits (with args and env) to a's over three short windows, and what b printed."""
    base = folder / "logits"
    install.run_tool("llama-perplexity", "-m", str(a), *WINDOWS, "--kl-divergence-base", str(base))
    more = ["--kl-divergence-base", base, "--kl-divergence", *args]
    done = tool("llama-perplexity", "-m", b, *WINDOWS, *more, env=env)
    assert done.returncode == 0, done.stderr[-800:]
    found = re.search(r"Mean\s+KLD:\s*([0-9.eE+-]+)", done.stdout + done.stderr)
    assert found
    return abs(float(found.group(1))), done.stdout + done.stderr


KERNELS = sorted({name for name, _, _ in native.kernels()} | {"neon_dotprod", "avx2"})


@pytest.mark.parametrize("kernel", KERNELS)
def test_forced_kernels_agree(demo_files: dict[str, Path], kernel: str, tmp_path: Path) -> None:
    """Only the order of float sums differs between kernels; the runtime says which one it uses."""
    if not any(name == kernel and ok for name, _, ok in native.kernels()):
        done = tool("llama-completion", "-m", demo_files["ours"], "-p", "x", "-n", "1", env={"PTQTP_KERNEL": kernel})
        assert done.returncode != 0 and "PTQTP_KERNEL" in done.stderr
        return
    kld, log = mean_kld(demo_files["ours"], demo_files["ours"], tmp_path, env={"PTQTP_KERNEL": kernel})
    assert kld < SAME_LOGITS
    assert re.search(rf"PTQTP\w* = {kernel}\b", log)


def test_an_unknown_kernel_is_an_error(demo_files: dict[str, Path]) -> None:
    args = ["-m", demo_files["ours"], "-p", "x", "-n", "1", "-no-cnv"]
    done = tool("llama-completion", *args, env={"PTQTP_KERNEL": "doesnotexist"})
    assert done.returncode != 0
    assert "PTQTP_KERNEL" in done.stderr and "doesnotexist" in done.stderr


# ---- panels ----


def test_panels_rows_and_wide_panels_agree(demo_files: dict[str, Path], tmp_path: Path) -> None:
    """The same weights row by row, interleaved (the default), and expanded to 4-bit codes at load."""
    ours = demo_files["ours"]
    for args, env, buffer, limit in (
        (["-v"], {}, "CPU_PTQTP model buffer", SAME_LOGITS),
        (["-v"], {"PTQTP_EXPAND": "1"}, "CPU_PTQTP_WIDE model buffer", SAME_LOGITS),
        (["-v", "--no-repack"], {}, None, OTHER_ROUNDING),
    ):
        kld, log = mean_kld(ours, ours, tmp_path, *args, env=env)
        assert kld < limit
        assert buffer in log if buffer else "PTQTP model buffer" not in log and "PTQTP_WIDE model" not in log


def test_experts_agree_with_the_row_path(moe_checkpoint: Path, tmp_path: Path) -> None:
    """MUL_MAT_ID on panels: many tokens at once, and one by one, against the same file without panels."""
    ours, exact = tmp_path / "ours.gguf", tmp_path / "exact.gguf"
    conversion.convert(moe_checkpoint, ours, Options(keep_bf16=exact))
    with Reader(ours) as r:
        assert sum(t.type == TP2_1.id and len(t.shape) == 3 for t in r.tensors) == 6
    quantizing = mean_kld(exact, ours, tmp_path)[0]
    for args in (["--no-repack"], ["-ub", "1"], ["-ub", "3"]):
        assert mean_kld(ours, ours, tmp_path, *args)[0] < quantizing / 20
    assert mean_kld(ours, ours, tmp_path, "-ub", "1", env={"PTQTP_EXPAND": "1"})[0] < quantizing / 20


# ---- llama.cpp's own tools ----


def test_the_twin_has_the_same_logits(demo_files: dict[str, Path], tmp_path: Path) -> None:
    assert mean_kld(demo_files["ours"], demo_files["twin"], tmp_path)[0] < OTHER_ROUNDING
    assert mean_kld(demo_files["bf16"], demo_files["ours"], tmp_path)[0] > 50 * SAME_LOGITS  # the measure measures


def test_llama_quantize_makes_the_same_bytes(demo_files: dict[str, Path], tmp_path: Path) -> None:
    """llama-quantize runs the same core, so each matrix that it turns into TP2_1 is ours byte for byte."""
    out = tmp_path / "q.gguf"
    install.run_tool("llama-quantize", str(demo_files["bf16"]), str(out), "TP2_1", "2")
    with Reader(out) as theirs, Reader(demo_files["ours"]) as ours:
        same = [t for t in theirs.tensors if t.type == TP2_1.id]
        assert len(same) == 210
        assert all(np.array_equal(theirs.bytes_of(t), ours.bytes_of(ours.by_name[t.name])) for t in same)
        assert theirs.get("general.file_type") == 251


def test_llama_quantize_lists_the_types_and_makes_tp2_0(tiny_checkpoint: Path, tmp_path: Path) -> None:
    page = tool("llama-quantize", "--help")
    assert "TP2_0" in page.stdout + page.stderr and "TP2_1" in page.stdout + page.stderr
    bf16, out = tmp_path / "bf16.gguf", tmp_path / "q.gguf"
    conversion.convert(tiny_checkpoint, tmp_path / "x.gguf", Options(keep_bf16=bf16))
    install.run_tool("llama-quantize", str(bf16), str(out), "TP2_0", "2")
    with Reader(out) as r, Reader(bf16) as source:
        t = r.by_name["blk.0.attn_q.weight"]
        assert t.type_name == "TP2_0"
        w = source.rows_f32(source.by_name[t.name])
        assert np.array_equal(r.bytes_of(t), quantize(TP2_0, find("search"), w))
        # rows of 192 are not a multiple of 128
        assert r.by_name["blk.0.ffn_down.weight"].type_name == "Q8_0"


def test_bench_names_the_type(demo_files: dict[str, Path]) -> None:
    args = ["-m", str(demo_files["ours"]), "-p", "8", "-n", "2", "-r", "1", "-o", "json"]
    out = install.run_tool("llama-bench", *args)
    rows = json.loads(out[out.index("[\n") : out.rindex("]") + 1])
    assert "TP2_1" in rows[0]["model_type"] and rows[0]["avg_ts"] > 0


def test_embedding_and_head_in_tp2_1_run_too(demo_files: dict[str, Path], tmp_path: Path) -> None:
    """get_rows and the output product: everything in TP2_1."""
    out = tmp_path / "all.gguf"
    install.run_tool(
        "llama-quantize",
        "--token-embedding-type",
        "tp2_1",
        "--output-tensor-type",
        "tp2_1",
        str(demo_files["bf16"]),
        str(out),
        "TP2_1",
        "2",
    )
    with Reader(out) as r:
        assert r.by_name["token_embd.weight"].type_name == "TP2_1"
    tokens = tokens_of(out)[:12]
    reference = Reference(out)
    exact, rounded = reference.logits(tokens), reference.logits(tokens, "rounded")
    effect = np.sqrt(((rounded - exact) ** 2).mean())
    assert np.sqrt(((logits_of(out, tokens) - exact) ** 2).mean()) < 1.5 * effect


# ---- what is refused ----


def damaged(source: Path, target: Path, find: bytes, replace: bytes) -> Path:
    raw = source.read_bytes()
    assert raw.count(find) == 1
    target.write_bytes(raw.replace(find, replace))
    return target


def refused(path: Path, *args: object) -> str:
    """Standard error of llama-completion refusing a file, from the first run that shows any error line.

    Upstream's tool logs from a thread of its own and often exits before the last lines are out; the exit code is sure.
    """
    text = ""
    for _ in range(20):
        done = tool("llama-completion", "-m", path, "-p", "x", "-n", "1", "-no-cnv", *args)
        assert done.returncode != 0
        text = done.stderr
        if "error loading model" in text:
            break
    return text


def test_loader_refuses_another_format_version(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    conversion.convert(tiny_checkpoint, path)
    key = b"ptqtp.format_version" + (4).to_bytes(4, "little")
    bad = damaged(path, tmp_path / "bad.gguf", key + fmt.FORMAT_VERSION.to_bytes(4, "little"), key + b"\x63\0\0\0")
    text = refused(bad)
    assert "format_version" in text and "99" in text


def test_check_tensors_finds_a_word_that_no_packer_writes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    conversion.convert(tiny_checkpoint, path)
    good = tool("llama-completion", "-m", path, "-p", "x", "-n", "1", "--check-tensors", "-no-cnv")
    assert good.returncode == 0, good.stderr[-500:]
    with Reader(path) as r:
        at = r.by_name["blk.1.ffn_up.weight"].offset + 5 * 14
    raw = bytearray(path.read_bytes())
    canonical = {-(-n * 65536 // POW5) for n in range(POW5)}
    raw[at : at + 2] = next(w for w in range(65536) if w not in canonical).to_bytes(2, "little")
    path.write_bytes(raw)
    assert "invalid data" in refused(path, "--check-tensors")


@pytest.fixture(scope="session")
def stock_loader() -> Path:
    """gguf_init_from_file of the pristine sdist, compiled from its own sources. Kept in build/stock."""
    build = REPO / "build"
    stock = build / "stock"
    loader = stock / "load"
    if loader.exists():
        return loader
    stock.mkdir(parents=True, exist_ok=True)
    tree = stock / "tree"
    if not tree.exists():
        builder = [sys.executable, str(REPO / "tools" / "build" / "build_runtime.py"), "--build-dir", str(build)]
        subprocess.run([*builder, "--pristine", str(tree)], check=True)
    ggml = tree / "vendor" / "llama.cpp" / "ggml"
    main = stock / "load.cpp"
    main.write_text(
        '#include "gguf.h"\nint main(int, char ** argv) { gguf_init_params p = { true, nullptr };\n'
        "return gguf_init_from_file(argv[1], p) ? 0 : 1; }\n"
    )
    parts = "ggml.c ggml-quants.c ggml.cpp ggml-alloc.c ggml-backend.cpp ggml-backend-meta.cpp ggml-threading.cpp"
    version = (ggml / "src" / "ggml-version.h.in").read_text()  # what its CMake would fill in
    (stock / "ggml-version.h").write_text(re.sub("@[A-Z_]+@", "0", version))
    flags = ["-O0", "-w", "-D_GNU_SOURCE", f"-I{stock}"]
    flags += [f"-I{ggml / 'include'}", f"-I{ggml / 'src'}"]
    objects = []
    for source in [main, *(ggml / "src" / name for name in [*parts.split(), "gguf.cpp"])]:
        objects.append(str(stock / f"{source.name}.o"))
        compiler = "gcc" if source.suffix == ".c" else "g++"
        subprocess.run([compiler, *flags, "-c", str(source), "-o", objects[-1]], check=True)
    partial = stock / "load.partial"
    subprocess.run(["g++", *objects, "-o", str(partial), "-lpthread", "-lm"], check=True)
    return partial.rename(loader)


def test_stock_llama_cpp_refuses_the_file(demo_files: dict[str, Path], stock_loader: Path) -> None:
    ours = subprocess.run([str(stock_loader), str(demo_files["ours"])], capture_output=True, text=True)
    assert ours.returncode == 1
    assert re.search(r"invalid ggml type 251", ours.stderr)
    assert subprocess.run([str(stock_loader), str(demo_files["twin"])], capture_output=True).returncode == 0


def test_rpc_between_patched_peers(demo_files: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(install.tool("rpc-server")), "-H", "127.0.0.1", "-p", str(port)]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        ours = demo_files["ours"]
        kld, _ = mean_kld(ours, ours, tmp_path, "--rpc", f"127.0.0.1:{port}", "-ngl", "99")
        assert kld < OTHER_ROUNDING  # the server holds rows
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    assert "Accepted client connection" in (tmp_path / "server.log").read_text(errors="replace")


def test_unknown_architecture(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["FrobnicatorForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not know the architecture FrobnicatorForCausalLM"):
        conversion.convert(folder, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_checkpoint_without_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="converter failed") as e:
        conversion.convert(folder, tmp_path / "out.gguf")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.glob("*out*"))


def test_stock_bindings_are_named(monkeypatch: pytest.MonkeyPatch, demo_files: dict[str, Path]) -> None:
    monkeypatch.setattr(install.importlib.metadata, "version", lambda _: "0.3.36")
    with pytest.raises(RuntimeMissing, match=r"llama-cpp-python 0\.3\.36 is a stock build"):
        runtime.load(demo_files["ours"])


def test_a_file_that_the_runtime_cannot_load(tiny_gguf: Path, cli) -> None:
    with pytest.raises(InputError, match="the runtime cannot load this file"):
        runtime.load(tiny_gguf)
    done = cli("run", tiny_gguf, "-p", "x")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("Error: ")


def test_keep_bf16_does_not_overwrite(demo_checkpoint: Path, demo_files: dict[str, Path], tmp_path: Path) -> None:
    before = demo_files["bf16"].stat()
    with pytest.raises(OutputError, match="exists already"):
        conversion.convert(demo_checkpoint, tmp_path / "x.gguf", Options(keep_bf16=demo_files["bf16"]))
    assert demo_files["bf16"].stat() == before
    assert checkpoint.is_gguf(demo_files["bf16"])


def test_nan_in_a_checkpoint_is_named_by_its_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    shard = next(p for p in sorted(folder.glob("*.safetensors")) if any("mlp" in n for n in load_file(p)))
    tensors = load_file(shard)
    name = next(n for n in tensors if "down_proj" in n)
    tensors[name][3, 4] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"damaged: tensor blk\.\d\.ffn_down\.weight holds nan at row 3, column 4"):
        conversion.convert(folder, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]
