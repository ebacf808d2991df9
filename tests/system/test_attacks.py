"""Small files that try something: each reader refuses each with one clear line.

tools/fixtures/make_attacks.py says what each tries.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, load_tool, safetensors_bytes

from ptqtp_gguf.calibrate import documents, texts
from ptqtp_gguf.calibrate import store as planes
from ptqtp_gguf.conversion.records import ConversionJournal, choices_of
from ptqtp_gguf.errors import CalibrationError, CheckpointError, InputError, OutputError, PtqtpError, RecipeError
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.files.journal import journal_path
from ptqtp_gguf.inspect.check import verify
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.plan import recipe
from ptqtp_gguf.source import checkpoint, imatrix, pickles
from ptqtp_gguf.source.checkpoint import to_bf16_gguf
from ptqtp_gguf.source.gguf import GgufSource

ATTACKS = load_tool("fixtures/make_attacks")
SECONDS = 5


def names(*kinds: str) -> list[str]:
    return [name for name, (_, kind, _) in ATTACKS.FILES.items() if kind in kinds]


def test_the_script_makes_exactly_these_files(tmp_path: Path) -> None:
    assert ATTACKS.main(tmp_path) == 0
    made = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    kept = {p.name: p.read_bytes() for p in ATTACKS.FOLDER.iterdir()}
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []
    assert max(len(raw) for raw in made.values()) < 12288


def read_gguf(path: Path) -> None:
    with GgufSource(path) as source:
        for key in source.kvs:
            source.get(key)


def read_index(path: Path) -> None:
    shutil.copy(path, path.with_name(checkpoint.INDEX))
    path.with_name("config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    checkpoint.check(path.parent)


def read_imatrix(path: Path) -> None:
    imatrix.read(path).close()


def read_journal(path: Path) -> None:
    before = path.read_bytes()
    out = path.with_name("out.gguf")
    shutil.copy(path, journal_path(out))
    try:
        ConversionJournal(out).__exit__(None, None, None)
    finally:
        assert journal_path(out).read_bytes() == before, "a damaged journal is left as it is"


def read_planes(path: Path) -> None:
    out = path.with_name("out.gguf")
    planes.planes_folder(out).mkdir()
    shutil.copy(path, journal_path(planes.planes_folder(out) / "planes"))
    planes.PlaneStore(out, {})


def read_data(path: Path) -> None:
    if faults := verify(path).faults:
        raise InputError(f"{path}: {faults[0]}")


READERS = {
    "gguf": (read_gguf, InputError),
    "data": (read_data, InputError),
    "safetensors": (checkpoint.shard_tensors, CheckpointError),
    "index": (read_index, CheckpointError),
    "pickle": (pickles.bin_tensors, CheckpointError),
    "imatrix": (read_imatrix, InputError),
    "recipe": (recipe.load, RecipeError),
    "journal": (read_journal, OutputError),
    "planes": (read_planes, OutputError),
}


@pytest.mark.parametrize("name", names(*READERS))
def test_is_refused_with_one_line(name: str, tmp_path: Path) -> None:
    what, kind, raw = ATTACKS.FILES[name]
    read, error = READERS[kind]
    path = tmp_path / name
    path.write_bytes(raw)
    started = time.monotonic()
    with pytest.raises(PtqtpError) as e:
        read(path)
    assert time.monotonic() - started < SECONDS, what
    assert isinstance(e.value, error), what
    line = str(e.value)
    assert str(tmp_path) in line and line.isprintable() and len(line) < 1000, what


@pytest.mark.runtime
def test_llama_cpp_refuses_them_too() -> None:
    """The patched build's loader: an exit code, no signal, soon."""
    tool = install.tool("llama-completion")
    command = [tool, "-n", "1", "-p", "a", "-no-cnv", "--no-warmup", "--check-tensors", "-t", "1", "-m"]
    for name in names("gguf", "data"):
        done = subprocess.run(
            [*map(str, command), str(ATTACKS.FOLDER / name)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=4 * SECONDS,
        )
        assert done.returncode == 1, f"{name}: {done.returncode}"


# ---- what no small file can hold ----


@pytest.mark.parametrize(
    "read", [Reader, imatrix.Imatrix, checkpoint.shard_tensors, pickles.bin_tensors, lambda p: recipe.load(p)]
)
def test_a_pipe_is_refused_and_not_waited_for(read: object, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(PtqtpError, match="no regular file"):
        read(tmp_path / "pipe.json")  # type: ignore[operator]


def test_a_journal_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b'{"precious"')
    journal_path(tmp_path / "out.gguf").symlink_to(victim)
    with pytest.raises(OutputError):
        ConversionJournal(tmp_path / "out.gguf")
    assert victim.read_bytes() == b'{"precious"'


def sparse(path: Path, raw: bytes, size: int) -> Path:
    with open(path, "wb") as f:
        f.write(raw)
        f.truncate(size)
    return path


LIMIT = """
import resource, sys, pathlib
from ptqtp_gguf.errors import PtqtpError
from ptqtp_gguf.inspect import verify
from ptqtp_gguf.source import checkpoint, imatrix, pickles
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), -1))
kind, path = sys.argv[2], pathlib.Path(sys.argv[3])
try:
    {"gguf": verify, "safetensors": checkpoint.shard_tensors, "imatrix": imatrix.Imatrix,
     "pickle": pickles.bin_tensors}[kind](path)
    print("read")
except PtqtpError as e:
    print("refused:", e)
"""


@pytest.mark.slow
def test_large_files_take_no_memory_by_what_they_claim(tmp_path: Path) -> None:
    """Sparse files of gigabytes, read with a limit on memory."""
    a = ATTACKS
    gap = a.gguf([a.ARCH], [a.tensor("a"), a.tensor("b", offset=1 << 31)], bytes(128))
    values = struct_dat((1 << 30) - 1)
    end = b"PK\5\6" + bytes(6) + b"\1\0" + (1 << 31).to_bytes(4, "little") + bytes(6)
    cases = {
        "gap.gguf": ("gguf", gap, (1 << 31) + 1024, "read"),
        "strings.gguf": ("gguf", a.gguf([a.kv("k", 9, a.array(8, 1 << 27))]), 3 << 30, "refused"),
        "bytes.gguf": ("gguf", a.gguf([a.kv("k", 9, a.array(0, 1 << 31))]), 3 << 30, "refused"),
        "tensors.gguf": ("gguf", a.gguf(counts=(1 << 26, 0)), 3 << 30, "refused"),
        "row.gguf": ("gguf", a.gguf([a.ARCH], [a.tensor(shape=(1 << 29,))]), 3 << 30, "refused"),
        "a.safetensors": ("safetensors", (1 << 30).to_bytes(8, "little") + b"{}", 3 << 30, "refused"),
        "a.dat": ("imatrix", values, 5 << 30, "refused"),
        "a.bin": ("pickle", bytes(64) + end, 0, "refused"),
    }
    for name, (kind, raw, size, expected) in cases.items():
        path = sparse(tmp_path / name, raw, size or len(raw))
        if name == "a.bin":
            with open(path, "r+b") as f:
                f.truncate(3 << 30)
                f.seek(0, os.SEEK_END)
                f.write(end)
        done = subprocess.run(
            [sys.executable, "-c", LIMIT, str(1 << 30), kind, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
        )
        path.unlink()
        assert done.stdout.startswith(expected), f"{name}: {done.stdout}{done.stderr[-500:]}"


def struct_dat(values: int) -> bytes:
    return bytes(ATTACKS.dat((b"a", 1, values, b"")))


def test_many_values_of_json_are_refused(tmp_path: Path) -> None:
    raw = b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"
    (tmp_path / "a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CheckpointError, match="more than 4194304 values"):
        checkpoint.shard_tensors(tmp_path / "a.safetensors")


def test_a_recipe_with_many_keys_is_refused_soon() -> None:
    keys = ",".join(f'"{i}":0' for i in range(60000))
    started = time.monotonic()
    with pytest.raises(RecipeError, match="key '7' stands twice"):
        recipe.parse(f'{{{keys},"7":0}}'.encode(), "r")
    assert time.monotonic() - started < SECONDS


def test_a_packed_line_without_end_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr(documents, "MAX_TEXT", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * 100000))
    with pytest.raises(CalibrationError, match="line 1: longer than the limit"):
        texts.load(str(tmp_path / "a.jsonl.gz"))


def test_a_journal_whose_plan_does_not_fit_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with GgufSource(tiny_gguf) as source, ConversionJournal(out) as journal:
        plan = [[t.type, "r", False] for t in source.tensors]
        journal.append({"job": {"options": {}, "plan": plan}})
        assert [c.type for c in choices_of(source, journal)] == [t.type for t in source.tensors]
        odd = next(i for i, t in enumerate(source.tensors) if t.shape[0] % 32)
        journal.job = {"options": {}, "plan": [[251 if i == odd else k, r, f] for i, (k, r, f) in enumerate(plan)]}
        with pytest.raises(OutputError, match="damaged"):
            choices_of(source, journal)
        journal.job = {"options": {}, "plan": plan[1:]}
        with pytest.raises(OutputError, match="damaged"):
            choices_of(source, journal)


@pytest.mark.hf
def test_python_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """llama.cpp's converter loads some tokenizers with trust_remote_code=True; we keep that from it."""
    from ptqtp_gguf.source.converter import ConverterStream

    folder = tmp_path / "evil"
    folder.mkdir()
    config = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
        "seq_length": 64,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    marker = tmp_path / "it-ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    header = {"transformer.ln_f.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(header, bytes(256)))
    found = checkpoint.check(folder)
    with pytest.raises(CheckpointError, match="brings Python code of its own"):
        ConverterStream(found, lambda _: None)
    with pytest.raises(CheckpointError, match="brings Python code of its own"):
        list(to_bf16_gguf(found, tmp_path / "out.gguf"))
    assert not marker.exists()
    for run in (lambda f: ConverterStream(f, lambda _: None), lambda f: list(to_bf16_gguf(f, tmp_path / "out.gguf"))):
        with pytest.raises(CheckpointError):  # with --trust-remote-code it is run: the test tests something
            run(checkpoint.check(folder, trust_code=True))
        marker.unlink()


def test_readme_lists_each() -> None:
    assert (REPO / "tests" / "attacks" / "README.md").read_text(encoding="utf-8") == ATTACKS.contents()


# ---- the fuzzer of the readers ----


def test_damaged_files_of_every_kind(tmp_path: Path) -> None:
    """tools/fuzz/fuzz_readers.py, for a moment; tools/fuzz/fuzz.py runs it for long."""
    done = subprocess.run(
        [sys.executable, REPO / "tools" / "fuzz" / "fuzz_readers.py", "--seconds", "2", "--corpus", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(load_tool("fuzz/fuzz_readers").READERS)
    assert all(r["runs"] > r["places"] and not r["findings"] for r in results)


def test_the_fuzzer_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool("fuzz/fuzz_readers")

    def careless(path: Path) -> None:
        if b"}}" not in path.read_bytes():
            raise KeyError("no end")

    def wordy(path: Path) -> None:
        error = InputError("x")
        error.args = ("two\nlines",)
        raise error

    for reader, word in ((careless, "KeyError"), (wordy, "not one line")):
        monkeypatch.setitem(tool.READERS, "safetensors", (reader, ".safetensors"))
        found = tool.fuzz("safetensors", 0.2, 0, tmp_path)["findings"]
        assert len(found) == 1 and word in found[0]
    assert len(list((tmp_path / "findings").iterdir())) == 1
