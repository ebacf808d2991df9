"""`verify`: every kind of damage is found, and a sound file is not accused."""

from __future__ import annotations

import importlib.metadata
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bench_models import write_llama
from helpers import rewritten, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptqtp_gguf.codec.native import pack, unpack
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.types import Key
from ptqtp_gguf.codec.unit import UNIT_BYTES
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files.gguf import GGML_TYPES, OutTensor, Reader, kv_string, kv_u32
from ptqtp_gguf.files.writing import write_verified
from ptqtp_gguf.inspect.check import Verdict, verify
from ptqtp_gguf.plan.options import Options
from ptqtp_gguf.quantize.pieces import checksum
from ptqtp_gguf.source.opening import open_source
from ptqtp_gguf.terminal.console import verdict_dict


@pytest.fixture(scope="module", params=["TP2_1", "TP2_2"])
def files(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(3)
    shapes = {"token_embd": (40, 64), "blk.0.attn_q": (48, 64), "blk.0.ffn_down": (64, 96), "blk.0.exps": (3, 16, 64)}
    tensors = {f"{n}.weight": (rng.normal(size=s) * 0.05).astype(np.float32) for n, s in shapes.items()}
    tensors["blk.0.attn_norm.weight"] = np.ones(63, np.float32)  # padding behind it
    source = write_gguf(folder / "source.gguf", tensors)
    convert(source, folder / "ours.gguf", Options(type=request.param))
    return source, folder / "ours.gguf"


def against(ours: Path, source: Path) -> Verdict:
    with open_source(source) as s:
        return verify(ours, s)


def test_a_sound_file(files: tuple[Path, Path]) -> None:
    source, ours = files
    verdict = against(ours, source)
    assert verdict.good and verdict.checksums and (verdict.tensors, verdict.planes) == (5, 3)
    errors = {e.name: e.rel_mse for e in verdict.errors}
    assert errors["blk.0.attn_norm.weight"] == 0
    assert 0 < errors["token_embd.weight"] < 1e-4
    with Reader(source) as a, Reader(ours) as b:
        for name in ("blk.0.attn_q.weight", "blk.0.exps.weight"):
            w, r = (f.rows_f32(f.by_name[name]).astype(np.float64) for f in (a, b))
            assert errors[name] == pytest.approx(((w - r) ** 2).sum() / (w**2).sum(), rel=1e-4)
            assert 0.01 < errors[name] < 0.04


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_of_the_data_is_found(files: tuple[Path, Path], tmp_path: Path, data: st.DataObject) -> None:
    ours = files[1]
    raw = bytearray(ours.read_bytes())
    with Reader(ours) as r:
        at = data.draw(st.integers(r.header.data_offset, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "bad.gguf").write_bytes(raw)
    assert not verify(tmp_path / "bad.gguf").good


def test_what_the_faults_say(files: tuple[Path, Path], tmp_path: Path) -> None:
    ours = files[1]
    good = ours.read_bytes()
    with Reader(ours) as r:
        q, norm, embedding = (r.by_name[f"{n}.weight"] for n in ("blk.0.attn_q", "blk.0.attn_norm", "token_embd"))

    def faults(at: int, new: bytes) -> list[str]:
        (tmp_path / "bad.gguf").write_bytes(good[:at] + new + good[at + len(new) :])
        return verify(tmp_path / "bad.gguf").faults

    word = struct.pack("<H", 1)  # no word of five digits packs to 1
    assert faults(q.offset + 5 * UNIT_BYTES, word) == [
        "tensor blk.0.attn_q.weight: block 5 holds a word or scale that no packer writes"
    ]
    other = bytes([good[q.offset + 12] ^ 1])  # another scale: a valid block of other weights
    assert faults(q.offset + 12, other) == ["tensor blk.0.attn_q.weight: reads back differently than it was written"]
    assert faults(norm.offset, b"\1\2\3\4") == [
        "tensor blk.0.attn_norm.weight: reads back differently than it was written"
    ]
    assert faults(embedding.offset, b"\1")[0].startswith("tensor token_embd.weight: reads back differently")
    assert faults(norm.offset + norm.nbytes, b"x") == ["bytes behind tensor blk.0.attn_norm.weight are not zero"]
    assert good == ours.read_bytes()


def test_damaged_headers(files: tuple[Path, Path], tmp_path: Path) -> None:
    good = files[1].read_bytes()
    for cut in (good[:-1], good + bytes(32)):
        (tmp_path / "bad.gguf").write_bytes(cut)
        assert "its tensors end at" in verify(tmp_path / "bad.gguf").faults[0]
    for bad in (good[:-100], good[:200], b"GGUF" + b"\xff" * 50, b""):
        (tmp_path / "bad.gguf").write_bytes(bad)
        with pytest.raises(InputError):
            verify(tmp_path / "bad.gguf")


def test_another_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    with Reader(files[0]) as r:
        tensors = {t.name: rng.normal(size=t.shape[::-1]).astype(np.float32) * 0.05 for t in r.tensors}
    del tensors["blk.0.exps.weight"]
    tensors["blk.0.ffn_down.weight"] = tensors["blk.0.ffn_down.weight"][:32]
    tensors["blk.1.new.weight"] = np.ones((2, 32), np.float32)
    faults = "\n".join(against(files[1], write_gguf(tmp_path / "other.gguf", tensors)).faults)
    assert "tensor blk.1.new.weight of" in faults and "is missing" in faults
    assert "tensor blk.0.exps.weight is not in" in faults
    assert "tensor blk.0.ffn_down.weight has the shape (96, 64), not (96, 32)" in faults
    assert "tensor blk.0.attn_q.weight: relative squared error" in faults and "these are other weights" in faults


def test_a_kept_tensor_must_be_equal(files: tuple[Path, Path], tmp_path: Path) -> None:
    with Reader(files[0]) as r:
        tensors = {t.name: r.rows_f32(t).reshape(t.shape[::-1]).copy() for t in r.tensors}
    tensors["blk.0.attn_norm.weight"][3] = 1.001
    faults = against(files[1], write_gguf(tmp_path / "other.gguf", tensors)).faults
    assert len(faults) == 1 and "blk.0.attn_norm.weight: kept as F32, yet it differs" in faults[0]


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    """A fault, and null in JSON, which has no NaN."""
    bad = write_gguf(tmp_path / "nan.gguf", {"blk.0.a.weight": np.full((2, 32), np.nan, np.float32)})
    verdict = against(bad, bad)
    assert verdict.faults == [
        "tensor blk.0.a.weight: holds values that are not finite, the first at row 0, column 0",
        "tensor blk.0.a.weight: relative squared error nan; these are other weights",
    ]
    assert json.loads(json.dumps(verdict_dict(verdict), allow_nan=False))["errors"][0]["rel_mse"] is None


@pytest.mark.runtime
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "IQ4_NL"])
def test_values_that_are_not_finite_in_any_type(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    """Whether or not the file has checksums, and though they are right."""
    w = {f"blk.0.{n}.weight": (rng.normal(size=(8, 256)) * 0.05).astype(np.float32) for n in ("a", "b")}
    source, ours = write_gguf(tmp_path / "a.gguf", w), tmp_path / "b.gguf"
    convert(source, ours, Options(tensor_types=(f"b.weight={kind}",)))
    assert verify(ours).good
    with Reader(ours) as r:
        t = r.by_name["blk.0.b.weight"]
        assert t.type_name == kind
        _, block, size = GGML_TYPES[t.type]
        hashes, at = r.get(Key.TENSOR_HASHES), t.offset + t.nbytes // 8 * 3 + size
        assert isinstance(hashes, list)
    raw = bytearray(ours.read_bytes())
    raw[at : at + size] = b"\xff" * size
    fault = f"tensor blk.0.b.weight: holds values that are not finite, the first at row 3, column {block % 256}"
    row = fault.replace("row 3, column 0", "row 4, column 0")
    (tmp_path / "bad.gguf").write_bytes(raw)
    assert verify(tmp_path / "bad.gguf").faults == [row]
    new = checksum(np.frombuffer(raw, np.uint8)[t.offset : t.offset + t.nbytes])
    old, new_ = (struct.pack("<Q", n) for n in (hashes[-1], new))
    assert raw.count(old) == 1
    (tmp_path / "bad.gguf").write_bytes(raw.replace(old, new_))
    assert verify(tmp_path / "bad.gguf").faults == [row]


@pytest.mark.parametrize("upper", [0x7C, 0xFC, 0x7E])  # of an fp16: Inf, -Inf, or NaN, as the lower byte has it
def test_a_free_scale_that_is_not_finite(tmp_path: Path, rng: np.random.Generator, upper: int) -> None:
    w = {"blk.0.a.weight": (rng.normal(size=(8, 256)) * 0.05).astype(np.float32)}
    convert(write_gguf(tmp_path / "a.gguf", w), tmp_path / "b.gguf", Options(type="TP2_0"))
    raw = bytearray((tmp_path / "b.gguf").read_bytes())
    with Reader(tmp_path / "b.gguf") as r:
        t = r.tensors[0]
    digits, scales = unpack(TP2_0, np.frombuffer(raw, np.uint8)[t.offset : t.offset + TP2_0.size].reshape(1, -1))
    packed = [pack(TP2_0, digits, np.full_like(scales, s)).reshape(-1) for s in (1, -2)]
    raw[t.offset + int(np.argmax(packed[0] != packed[1]))] = upper
    (tmp_path / "bad.gguf").write_bytes(raw)
    assert "a word or scale that no packer writes" in verify(tmp_path / "bad.gguf").faults[0]


@pytest.mark.runtime
def test_a_file_that_the_runtime_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_llama(tmp_path / "a.gguf")
    ours = convert(source, tmp_path / "b.gguf").files
    parts = convert(source, tmp_path / "c.gguf", Options(split_max_size=20000)).files
    assert len(parts) > 1
    for path in (source, ours[0], parts[0], parts[-1]):
        verdict = verify(path)
        assert verdict.good and not verdict.notes, path
    bad = rewritten(ours[0], tmp_path / "bad.gguf", [kv_u32("llama.block_count", 2)])
    why = "the runtime cannot load this file: tensor 'blk.1.attn_norm.weight' not found"
    assert verify(bad).faults == [why]
    rewritten(parts[0], tmp_path / "d.gguf", [kv_u32("llama.block_count", 2)]).replace(parts[0])
    assert why in verify(parts[-1]).faults
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.36")
    verdict = verify(bad)
    assert verdict.good and verdict.notes[0].startswith(
        "not tried whether the runtime loads it: llama-cpp-python 0.3.36"
    )


def test_a_file_that_is_no_whole_model_is_not_tried(files: tuple[Path, Path], tmp_path: Path) -> None:
    note = "no tokenizer in it (tokenizer.ggml.model): no model that the runtime loads as it is; not tried"
    verdict = verify(files[1])
    assert verdict.good and verdict.notes == [note]
    assert verdict_dict(verdict)["notes"] == [note]


def tuned_copy(source: Path, folder: Path) -> Path:
    """A file that is called tuned in its metadata, one matrix kept as F32."""
    kept, out = folder / "kept.gguf", folder / "tuned.gguf"
    convert(source, kept, Options(tensor_types=("ffn_down=F32",)))
    old, new = (kv_string(Key.METHOD, m) for m in ("search", "tuned"))
    with Reader(kept) as r:
        kvs = [new if kv.key == Key.METHOD else kv for kv in r.header.kvs.values()]
        tensors = [OutTensor(t.name, t.shape, t.type) for t in r.tensors]
        assert old in r.header.kvs.values()
        data = (np.ascontiguousarray(r.bytes_of(t)) for t in r.tensors)
        write_verified(out, kvs, tensors, r.header.alignment, data, lambda _: None)
    return out


def test_norms_of_a_tuned_file_may_differ(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Their distance is told instead; other weights are still a fault, and so is a matrix that was kept."""
    with Reader(files[0]) as r:
        tensors = {t.name: r.rows_f32(t).reshape(t.shape[::-1]).copy() for t in r.tensors}
    tensors["blk.0.attn_norm.weight"][3] = 1.1
    tensors["blk.0.ffn_down.weight"][3, 3] += 0.01
    ours = tuned_copy(files[0], tmp_path)
    verdict = against(ours, write_gguf(tmp_path / "other.gguf", tensors))
    errors = {e.name: e.rel_mse for e in verdict.errors}
    assert errors["blk.0.attn_norm.weight"] == pytest.approx(0.01 / (62 + 1.21), rel=1e-3)
    assert len(verdict.faults) == 1 and "blk.0.ffn_down.weight: kept as F32, yet it differs" in verdict.faults[0]
    tensors["blk.0.attn_norm.weight"][:] = 5
    faults = against(ours, write_gguf(tmp_path / "far.gguf", tensors)).faults
    assert any("blk.0.attn_norm.weight: relative squared error" in f for f in faults)


def test_split_files_and_files_without_checksums(files: tuple[Path, Path], tmp_path: Path) -> None:
    parts = convert(files[0], tmp_path / "m.gguf", Options(split_max_size=4000)).files
    verdict = against(parts[-1], files[0])
    assert verdict.good and verdict.tensors == 5 and set(verdict.sha256) == {p.name for p in parts}
    raw = bytearray(parts[1].read_bytes())
    raw[-40] ^= 4
    parts[1].write_bytes(raw)
    assert verify(parts[0]).faults[0].startswith(parts[1].name)
    assert verify(files[0]).good and not verify(files[0]).checksums  # a stock file


def test_the_command(cli: Callable, files: tuple[Path, Path], tmp_path: Path) -> None:
    source, ours = files
    done = cli("verify", ours, "--against", source)
    assert done.returncode == 0 and "sound" in done.stdout and "sha256" in done.stdout
    raw = bytearray(ours.read_bytes())
    raw[-50] ^= 1
    (tmp_path / "bad.gguf").write_bytes(raw)
    done = cli("verify", tmp_path / "bad.gguf", "-q")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: ") and "bad.gguf: tensor" in done.stderr
