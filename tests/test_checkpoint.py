"""Checkpoint folders that are incomplete, damaged or hostile: named before a weight is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from helpers import safetensors_bytes

from ptqtp_gguf.checkpoint import INDEX, check, is_gguf, shard_tensors
from ptqtp_gguf.errors import CheckpointError, InputError

GOOD = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}  # fmt: skip


def entry(**changes: object) -> dict:
    return {"a": {**GOOD["a"], **changes}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "one.safetensors").write_bytes(safetensors_bytes(GOOD, bytes(22)))
    other = {"c": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    (tmp_path / "two.safetensors").write_bytes(safetensors_bytes(other, bytes(8)))
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_good_folder(folder: Path) -> None:
    found = check(folder)
    assert (found.architecture, found.nbytes, [s.name for s in found.shards]) == (
        "LlamaForCausalLM", 30, ["one.safetensors", "two.safetensors"],
    )  # fmt: skip
    (folder / INDEX).unlink()
    (folder / "one.safetensors").rename(folder / "model.safetensors")
    assert check(folder).nbytes == 22


HEADERS = {
    "2^60 bytes of header": (struct.pack("<Q", 1 << 60) + b"{}", "claims 1152921504606846976 bytes"),
    "four bytes": (b"\x01\0\0\0", "damaged or truncated"),
    "not JSON": (safetensors_bytes(b"{nope"), "not valid JSON"),
    "deep JSON": (safetensors_bytes(b"[" * 200_000), "not valid JSON|no JSON object"),
    "a list": (safetensors_bytes([1]), "no JSON object"),
    "not UTF-8": (safetensors_bytes(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "name twice": (safetensors_bytes(b'{"a": {}, "a": {}}'), "'a' stands twice"),
    "no entry": (safetensors_bytes({"a": 3}), "tensor a: damaged header entry"),
    "dtype": (safetensors_bytes(entry(dtype="F3"), bytes(16)), "unknown dtype 'F3'"),
    "negative shape": (safetensors_bytes(entry(shape=[-2, -2]), bytes(16)), "damaged shape"),
    "shape of floats": (safetensors_bytes(entry(shape=[2.0, 2]), bytes(16)), "damaged shape"),
    "shape of bools": (safetensors_bytes(entry(shape=[True, 4]), bytes(16)), "damaged shape"),
    "huge shape": (safetensors_bytes(entry(shape=[1 << 62, 1 << 62]), bytes(16)), "16 bytes for shape"),
    "offsets swapped": (safetensors_bytes(entry(data_offsets=[16, 0]), bytes(16)), "truncated: data at 16..0"),
    "offsets beyond": (safetensors_bytes(entry(data_offsets=[0, 1 << 50]), bytes(16)), "truncated"),
    "cut in the middle": (safetensors_bytes(GOOD, bytes(20)), "tensor b: truncated"),
    "hole": (safetensors_bytes(entry(data_offsets=[4, 20]), bytes(20)), "expected 0"),
    "bytes left over": (safetensors_bytes(GOOD, bytes(40)), "40 bytes of data, 22"),
    "overlap": (
        safetensors_bytes({"a": GOOD["a"], "z": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}, bytes(16)),
        "tensor z starts at byte 8, expected 16",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_safetensors(name: str, tmp_path: Path) -> None:
    raw, message = HEADERS[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as e:
        shard_tensors(path)
    assert str(path) in str(e.value)


def test_missing_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard two\.safetensors is missing"):
        check(folder)


def test_index_names_an_absent_tensor(folder: Path) -> None:
    index(folder, {"a": "one.safetensors", "ghost": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor ghost is named by .* but absent"):
        check(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    (folder / "two.safetensors").write_bytes(safetensors_bytes(GOOD, bytes(22)))
    index(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor a stands in both one\.safetensors and two\.safetensors"):
        check(folder)


@pytest.mark.parametrize("shard", ["../one.safetensors", "/etc/passwd", "..", "", 7, "x/one.safetensors"])
def test_index_cannot_lead_out_of_the_folder(folder: Path, shard: object) -> None:
    index(folder, {"a": shard})
    with pytest.raises(CheckpointError, match="no plain file name"):
        check(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no 'weight_map'"),
        ("[]", "no JSON object"),
        ("{", "not valid JSON"),
        ('{"weight_map": []}', "weight_map"),
    ],
)
def test_damaged_index(folder: Path, text: str, message: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        check(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "no 'architectures'"), ('{"architectures": []}', "no 'architectures'"), ("nope", "not valid JSON"),
     ('{"architectures": [3]}', "no 'architectures'")],
)  # fmt: skip
def test_damaged_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        check(folder)


def test_folders_that_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"found one\.safetensors, but no model\.safetensors\.index\.json"):
        check(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"only pytorch \.bin files, which can run code"):
        check(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        check(folder)


def test_what_a_path_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"GGUFxxxx")
    assert is_gguf(tmp_path / "a") and not is_gguf(tmp_path)
    with pytest.raises(InputError, match="No such file"):
        is_gguf(tmp_path / "absent")
