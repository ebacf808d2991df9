"""The installed build: its tools know our types, stock builds are told apart and refuse our files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO, llama_tool

from ptqtp_gguf.codec import TensorType
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.codec.unit import POW5
from ptqtp_gguf.conversion import pipeline as conversion
from ptqtp_gguf.errors import RuntimeMissing
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.llamacpp import model as runtime
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.quantize.methods import find, quantize

pytestmark = pytest.mark.runtime


def test_an_unknown_kernel_is_an_error(demo_files: dict[str, Path]) -> None:
    args = ["-m", demo_files["ours"], "-p", "x", "-n", "1", "-no-cnv"]
    done = llama_tool("llama-completion", *args, env={"PTQTP_KERNEL": "doesnotexist"})
    assert done.returncode != 0
    assert "PTQTP_KERNEL" in done.stderr and "doesnotexist" in done.stderr


@pytest.mark.parametrize("kind", [TP2_2, TP2_1], ids=lambda t: t.name)
def test_llama_quantize_makes_the_same_bytes(demo_files: dict[str, Path], tmp_path: Path, kind: TensorType) -> None:
    """llama-quantize runs the same core, so each matrix that it turns into our types is ours byte for byte."""
    out, mine = tmp_path / "q.gguf", demo_files["ours"]
    install.run_tool("llama-quantize", str(demo_files["bf16"]), str(out), kind.name, "2")
    if kind != TP2_2:
        mine = conversion.convert(demo_files["bf16"], tmp_path / "mine.gguf", Options(type=kind.name)).path
    with Reader(out) as theirs, Reader(mine) as ours:
        same = [t for t in theirs.tensors if t.type == kind.id]
        assert len(same) == 210
        assert all(np.array_equal(theirs.bytes_of(t), ours.bytes_of(ours.by_name[t.name])) for t in same)
        assert theirs.get("general.file_type") == kind.id
        assert theirs.get("ptqtp.format_version") == ours.get("ptqtp.format_version") == kind.since


def test_llama_quantize_lists_the_types_and_makes_tp2_0(tiny_checkpoint: Path, tmp_path: Path) -> None:
    page = llama_tool("llama-quantize", "--help")
    assert all(name in page.stdout + page.stderr for name in fmt.BY_NAME)
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
    assert "TP2_2" in rows[0]["model_type"] and rows[0]["avg_ts"] > 0


def damaged(source: Path, target: Path, find: bytes, replace: bytes) -> Path:
    raw = source.read_bytes()
    assert raw.count(find) == 1
    target.write_bytes(raw.replace(find, replace))
    return target


def refused(path: Path, check: bool = False) -> str:
    """What the library logs as errors where it refuses a file. check: look at all values while loading.

    Not by llama-completion: its log has a thread of its own, and it often exits before the last lines are out.
    """
    import llama_cpp

    from ptqtp_gguf.llamacpp import log

    params = llama_cpp.llama_model_default_params()
    params.check_tensors = check
    with log.hushed() as complaints:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if model:
        llama_cpp.llama_model_free(model)
    assert not model
    return "\n".join(complaints)


def test_loader_refuses_another_format_version(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    conversion.convert(tiny_checkpoint, path)
    key = b"ptqtp.format_version" + (4).to_bytes(4, "little")
    bad = damaged(path, tmp_path / "bad.gguf", key + fmt.DEFAULT.since.to_bytes(4, "little"), key + b"\x63\0\0\0")
    text = refused(bad)
    assert "format_version" in text and "99" in text


def test_check_tensors_finds_a_word_that_no_packer_writes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    conversion.convert(tiny_checkpoint, path)
    good = llama_tool("llama-completion", "-m", path, "-p", "x", "-n", "1", "--check-tensors", "-no-cnv")
    assert good.returncode == 0, good.stderr[-500:]
    with Reader(path) as r:
        at = r.by_name["blk.1.ffn_up.weight"].offset + 5 * 14
    raw = bytearray(path.read_bytes())
    canonical = {-(-n * 65536 // POW5) for n in range(POW5)}
    raw[at : at + 2] = next(w for w in range(65536) if w not in canonical).to_bytes(2, "little")
    path.write_bytes(raw)
    assert "invalid data" in refused(path, check=True)


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
    assert re.search(r"invalid ggml type 252", ours.stderr)
    assert subprocess.run([str(stock_loader), str(demo_files["twin"])], capture_output=True).returncode == 0


def test_stock_bindings_are_named(monkeypatch: pytest.MonkeyPatch, demo_files: dict[str, Path]) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.3.36")
    runtime._llama.cache_clear()  # the runtime may be loaded already
    with pytest.raises(RuntimeMissing, match=r"llama-cpp-python 0\.3\.36 is a stock build"):
        runtime.load(demo_files["ours"])
