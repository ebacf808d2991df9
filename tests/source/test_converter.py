"""The converter as a stream: the bytes of the file that it would write, and no process or file left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from ptqtp_gguf.errors import CheckpointError
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.source import _converter_child as child
from ptqtp_gguf.source.checkpoint import BIN_INDEX, INDEX, check
from ptqtp_gguf.source.converter import ConverterStream

pytestmark = [pytest.mark.runtime, pytest.mark.hf]


def whole(stream: ConverterStream, size: int = 100_003) -> bytes:
    """The file again, from header and chunks."""
    out = bytearray(stream.size)
    out[: len(stream.header_bytes)] = stream.header_bytes
    for t in stream.header.tensors:
        at = t.offset
        for chunk in stream.chunks(t, size):
            assert chunk.nbytes == min(size, t.offset + t.nbytes - at)
            out[at : at + chunk.nbytes] = chunk.tobytes()
            at += chunk.nbytes
    return bytes(out)


def ignore(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def unhookable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converter with a method of its writer renamed: as good as before, but of another version to the stream."""
    folder = tmp_path_factory.mktemp("other") / "convert"
    shutil.copytree(install.converter().parent, folder)
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "open_output_file" in text:
            path.write_text(text.replace("open_output_file", "open_target"), encoding="utf-8")
    return folder / "convert_hf_to_gguf.py"


@pytest.fixture(scope="module")
def experts(moe_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts to be stacked, a query matrix to be permuted; F32, F16 and BF16, NaN and Inf among them; three shards."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("experts") / "moe"
    shutil.copytree(moe_checkpoint, folder)
    tensors = {k: v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    for i, name in enumerate(sorted(n for n in tensors if tensors[n].dim() > 1)):
        tensors[name] = tensors[name].to([torch.float32, torch.bfloat16, torch.float16][i % 3])
        if tensors[name].dtype == torch.float32:
            tensors[name] = tensors[name] * 1.001  # no bf16 any more: rounding counts
    embedding = tensors["model.embed_tokens.weight"]
    embedding[5, 7], embedding[6, 1] = torch.nan, -torch.inf
    weight_map: dict[str, str] = {}
    for i in range(3):
        part = {name: tensors[name] for name in sorted(tensors)[i::3]}
        save_file(part, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def written(experts: Path, unhookable: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bf16 GGUF of the checkpoint, written in two passes, through the stream's fallback."""
    path = tmp_path_factory.mktemp("two-pass") / "moe.gguf"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(install, "converter", lambda: unhookable)
        with ConverterStream(check(experts), lines.append, path) as stream:
            data = path.read_bytes()
            assert whole(stream) == data
            t = stream.header.tensors[1]
            assert next(stream.chunks(t, 7)).tobytes() == data[t.offset : t.offset + 7]
        assert not path.exists()
        with pytest.raises(
            CheckpointError, match=r"cannot be read as a stream .*open_output_file is missing.*keep the"
        ):
            ConverterStream(check(experts), ignore)
    assert any("GGUFWriter.open_output_file is missing); writing" in line for line in lines)
    return data


def test_stream_is_the_file(experts: Path, written: bytes) -> None:
    lines: list[str] = []
    with ConverterStream(check(experts), lines.append) as stream:
        assert stream.size == len(written)
        assert written.startswith(stream.header_bytes) and stream.header.data_offset == len(stream.header_bytes)
        assert any("Set model tokenizer" in line for line in lines)
        tensors = stream.header.tensors
        assert {len(t.shape) for t in tensors} == {1, 2, 3}
        first, last = tensors[0], tensors[-1]
        # any order, again, whole at once, and left in the middle
        for t in (last, first, first, tensors[3]):
            begun = stream.chunks(first, 4096)
            assert next(begun).tobytes() == written[first.offset : first.offset + 4096]
            assert b"".join(c.tobytes() for c in stream.chunks(t, 1 << 30)) == written[t.offset : t.offset + t.nbytes]
            with pytest.raises(RuntimeError, match="another reading"):
                next(begun)
        assert whole(stream) == written
        os.kill(stream._process.pid, signal.SIGKILL)
        with pytest.raises(CheckpointError, match=r"moe: llama.cpp's converter was killed by signal 9 \(SIGKILL\)"):
            list(stream.chunks(last, 1000))
    with pytest.raises(CheckpointError):
        list(stream.chunks(last, 1000))


def test_bin_checkpoint_is_its_safetensors_twin(experts: Path, written: bytes, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / experts.name
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(sorted(experts.glob("*.safetensors"))):
        tensors = load_file(shard)
        in_order = {
            name: tensors[name] for name in sorted(tensors)
        }  # as the converter takes those of a safetensors file
        torch.save(in_order, folder / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(tensors, f"pytorch_model-{i}.bin")
    (folder / BIN_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for path in (*experts.glob("*.json"), experts / "tokenizer.model"):
        if path.name != INDEX:
            shutil.copy(path, folder)
    found = check(folder)
    assert found.nbytes == check(experts).nbytes
    with ConverterStream(found, ignore) as stream:
        assert whole(stream) == written


def test_rounding_is_gguf_pys() -> None:
    import torch

    high = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    server = child.Server.__new__(child.Server)
    server.gguf, server.torch, server.quantize = gguf, torch, gguf.quants.quantize
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (high | np.uint32(low)).view(np.float32)
        for part in (x, x[np.isfinite(x)], x[~np.isnan(x)]):
            made = server.bf16(torch.from_numpy(part.copy()))
            assert np.asarray(made).tobytes() == gguf.quants.quantize(part, gguf.GGMLQuantizationType.BF16).tobytes()


def test_names_that_the_stream_needs() -> None:
    """In the converter's own gguf-py all are there; what is missing is named: a method, an attribute, a class."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gguf\n"
        "from ptqtp_gguf.source._converter_child import missing\n"
        "print([missing(gguf)])\n"
        "gguf.LazyBase.__init__ = lambda self: None; print(missing(gguf))\n"
        "del gguf.GGUFWriter.write_padding; print(missing(gguf))\n"
        "del gguf.GGUFWriter; print(missing(gguf))\n"
    )
    command = [sys.executable, "-I", "-c", code, str(install.converter().parent / "gguf-py")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert out == ["['']", "gguf.LazyBase()._data", "gguf.GGUFWriter.write_padding", "gguf.GGUFWriter"]


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_for(what: object, seconds: float = 60) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.05)
    raise AssertionError(f"{what} after {seconds} s")


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task").exists(), reason="needs /proc")
def test_the_converter_dies_with_a_killed_parent(moe_checkpoint: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ptqtp_gguf.source import checkpoint, converter\n"
        "converter.ConverterStream(checkpoint.check(Path(sys.argv[1])), print)"
    )
    parent = subprocess.Popen([sys.executable, "-I", "-c", code, str(moe_checkpoint)], stdout=subprocess.DEVNULL)
    try:
        for _ in wait_for("no converter"):
            if found := children(parent.pid):
                break
        time.sleep(0.5)  # past the start of its interpreter
    finally:
        parent.kill()
        parent.wait()
    for _ in wait_for("the converter still runs"):
        status = Path(f"/proc/{found[0]}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if status.read_text().rpartition(")")[2].split()[0] != "Z":
                continue
        break
