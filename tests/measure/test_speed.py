"""Speed: the mathematics of rounds by hand, the machine from made-up trees, and a real llama-bench on a tiny model."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.errors import BenchError, InputError
from ptqtp_gguf.llamacpp import model as runtime
from ptqtp_gguf.measure import _load_child, machine, rounds
from ptqtp_gguf.measure.energy import Rapl
from ptqtp_gguf.measure.rounds import File, Settings
from ptqtp_gguf.measure.speed import Bench, bench, token_bytes
from ptqtp_gguf.measure.statistics import ratios, spread
from ptqtp_gguf.source.gguf import GgufSource

command = importlib.import_module("ptqtp_gguf.commands.bench")
bench_module = importlib.import_module("ptqtp_gguf.measure.speed")
VOCAB, WIDTH, FFN = 64, 64, 96
HERE = machine.Machine("cpu", 2, 2, 1 << 34, "os", (), "scalar", None)


def write_llama(path: Path, extra: dict[str, tuple[int, ...]] | None = None, **numbers: int) -> Path:
    """A random llama of one block that llama.cpp runs. extra: tensors besides; numbers: llama.* in the metadata."""
    rng = np.random.default_rng(1)
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(512)
    w.add_embedding_length(WIDTH)
    w.add_block_count(numbers.pop("block_count", 1))
    w.add_feed_forward_length(FFN)
    w.add_head_count(2)
    w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(32)
    for key, value in numbers.items():
        w.add_uint32(f"llama.{key}", value)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"t{i}" for i in range(VOCAB)])
    w.add_token_scores([0.0] * VOCAB)
    w.add_token_types([gguf.TokenType.NORMAL] * VOCAB)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.attn_{n}": (WIDTH, WIDTH) for n in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,), "blk.0.ffn_down": (WIDTH, FFN)}
    shapes |= {"blk.0.ffn_gate": (FFN, WIDTH), "blk.0.ffn_up": (FFN, WIDTH), **(extra or {})}
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", (rng.normal(size=shape) * 0.05).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model as F32 and as TP2_1."""
    folder = tmp_path_factory.mktemp("bench")
    full = write_llama(folder / "tiny-f32.gguf")
    convert(full, folder / "tiny.gguf")
    return [folder / "tiny.gguf", full]


def made_up(speeds: dict[str, list[float]], **changes: object) -> Bench:
    """Rounds of one test from samples by label; changes: to each round."""
    n = len(next(iter(speeds.values())))
    settings = Settings((), (8,), (1,), n)
    files = [File(Path(f"{label}.gguf"), label, 1000, 500_000_000) for label in speeds]
    start = {"load_s": 0.5, "ttft_s": 2.0, "peak_memory": 1000, "energy": None}
    made = [
        {
            "number": i,
            "sizes": dict.fromkeys(speeds, 1000),
            "bandwidth": {"1": 10e9 - i},
            "busy": 0.0,
            "speed": {label: {"tg8 t1": s[i]} for label, s in speeds.items()},
            "start": {label: dict(start) for label in speeds},
            "load": [0.1 * i, 0.2 * i],
            "first_of": [128, 1],
            **changes,
        }
        for i in range(n)
    ]
    return Bench(settings, files, made, HERE, 0)


# ---- mathematics ----


@pytest.mark.parametrize(
    ("n", "low", "high", "confidence"),  # 1 - 2 * (binomial tail below k) / 2^n, by hand
    [
        (1, 1, 1, 0.0),
        (3, 1, 3, 0.75),
        (5, 1, 5, 0.9375),
        (7, 1, 7, 126 / 128),
        (8, 2, 7, 238 / 256),
        (11, 3, 9, 1914 / 2048),
    ],
)
def test_interval_of_a_median(n: int, low: int, high: int, confidence: float) -> None:
    samples = list(range(1, n + 1))
    random.Random(n).shuffle(samples)
    s = spread(samples)
    assert (s.median, s.low, s.high, s.confidence) == ((n + 1) / 2, low, high, pytest.approx(confidence))


def test_interval_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    for n in (5, 9):
        found = [spread(list(rng.exponential(size=n))) for _ in range(2000)]
        inside = np.mean([s.low <= np.log(2) <= s.high for s in found])
        assert abs(inside - found[0].confidence) < 0.03
        assert found[0].confidence >= 0.9


def test_ratios_are_paired_by_round() -> None:
    drifting = [100.0, 50.0, 25.0, 80.0, 10.0]  # the machine; ours is 1.1 times as fast in each round
    ratio = ratios([1.1 * x for x in drifting], drifting)
    assert ratio.low == pytest.approx(1.1) and ratio.high == pytest.approx(1.1) and ratio.clear
    assert not ratios([2.0, 2.0, 2.0, 2.0, 1.9], [1.0, 1.0, 1.0, 1.0, 2.0]).clear  # one round the other way
    assert not ratios([2.0] * 4, [1.0] * 4).clear  # four rounds never suffice
    assert ratios([0.5] * 5, [1.0] * 5).clear


def test_figures_of_a_row() -> None:
    b = made_up({"a": [10.0, 12.0, 11.0, 14.0, 13.0], "b": [5.0, 6.0, 5.5, 7.0, 6.5]})
    data = json.loads(json.dumps(b.as_dict(), allow_nan=False))
    row = data["rows"][0]
    assert row["label"] == "a" and row["file"] == "a.gguf" and row["token_bytes"] == 500_000_000
    assert row["speed"] == [
        {
            "test": "tg8",
            "n_prompt": 0,
            "n_gen": 8,
            "threads": 1,
            "median": 12.0,
            "low": 10.0,
            "high": 14.0,
            "samples": [10.0, 12.0, 11.0, 14.0, 13.0],
            "share": pytest.approx(0.6),
        },
    ]
    assert row["ratios"] == {"b": {"tg8 t1": {"median": 2.0, "low": 2.0, "high": 2.0, "clear": True}}}
    assert data["rows"][1]["ratios"]["a"]["tg8 t1"]["median"] == 0.5
    assert (row["load_s"], row["ttft_s"], row["peak_memory"], row["energy"]) == (0.5, 2.0, 1000, None)
    assert data["bench"]["bandwidth"] == {"1": 10.0} and data["bench"]["rounds"] == 5
    assert data["machine"]["load"] == [0.0, 0.8] and data["warnings"] == []


def test_warnings_name_what_is_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    even = {"a": [10.0] * 5, "b": [5.0] * 5}
    assert made_up(even).warnings == []
    assert "up to 30% of the CPUs in 5 of 5 rounds" in made_up(even, busy=0.3).warnings[0]
    assert made_up(even, busy=None).warnings == []
    slow = replace(made_up(even), machine=replace(HERE, governor="performance, powersave", cpus=1), free=999)
    assert [w.split(":")[0] for w in slow.warnings[:1]] == ["the CPU's governor is powersave"]
    assert sum("of memory are free" in w for w in slow.warnings) == 2
    threads = made_up(even)
    threads.machine = replace(HERE, cpus=0)
    assert threads.warnings == ["1 threads on 0 CPUs: they wait for one another"]
    threads.machine = replace(HERE, quota=0.5)
    assert threads.warnings == ["1 threads, but the container may take 0.5 CPUs' worth of time: they are held up"]
    wide = made_up({"a": [10.0, 9.0, 10.0, 10.0, 10.0], "b": [8.0, 20.0, 9.0, 8.0, 12.0], "c": [10.0] * 5})
    (text, other) = [w for w in wide.warnings if "differ too much" in w] + [""]
    assert "tg8 t1" in text and "b / a 0.80 to 2.22" in text and "c / a" not in text and not other
    assert "2 rounds: intervals hold the true median with 50% only" in made_up({"a": [1.0, 1.0]}).warnings[0]
    assert "108% of memory's bandwidth" in made_up({"a": [21.6] * 5}).warnings[0]
    monkeypatch.setenv("PTQTP_KERNEL", "scalar")
    assert made_up(even).warnings == ["PTQTP_KERNEL=scalar forces a kernel"]


# ---- the machine ----


def test_machine_from_a_made_up_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_allowed", lambda: [0, 1, 2, 3])
    assert machine.describe(tmp_path).governor is None  # nothing there: nulls, no error
    assert (machine.describe(tmp_path).memory, machine.describe(tmp_path).features) == (None, ())
    cpu = tmp_path / "sys/devices/system/cpu"
    for n in range(4):
        (cpu / f"cpu{n}/topology").mkdir(parents=True)
        (cpu / f"cpu{n}/cpufreq").mkdir()
        (cpu / f"cpu{n}/topology/thread_siblings_list").write_text(f"{n % 2},{n % 2 + 2}\n")
        (cpu / f"cpu{n}/cpufreq/scaling_governor").write_text("powersave\n" if n == 3 else "performance\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: A: CPU\nflags\t\t: fpu avx2 ssse3 avx512f_not amx_int8\n\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16000 kB\nMemFree: 1 kB\n")
    m = machine.describe(tmp_path)
    assert (m.cpu, m.cores, m.cpus, m.memory) == ("A: CPU", 2, 4, 16000 * 1024)
    assert m.features == ("ssse3", "avx2", "amx_int8") and m.governor == "performance, powersave"
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for text, quota in (("max 100000\n", None), ("150000 100000\n", 1.5), ("", None)):
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(text)
        assert machine.describe(tmp_path).quota == quota
    assert m.kernel == runtime.system_info()["PTQTP"]


def test_others_use_of_the_cpus(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 1000 0 0 0 0 0 0\ncpu0 1 1 1 1\n")
    before = machine.moment(stat)
    stat.write_text("cpu  400 0 100 1600 0 0 0 100 50 0\ncpu0 1 1 1 1\n")  # 300 user, 100 stolen, 600 idle
    after = machine.moment(stat)
    assert before and after
    second = 0.01 * (after.total - before.total) / 10  # of 1000 ticks, whatever a tick is
    mine = replace(after, ours=before.ours + 100 * second * 10 / 10)
    assert machine.busy_share(before, mine) == pytest.approx(0.3)
    assert machine.busy_share(before, replace(after, ours=before.ours + 1e9)) == 0.0
    assert machine.busy_share(before, before) is None and machine.busy_share(None, after) is None
    assert machine.moment(tmp_path / "nowhere") is None


def test_busy_child_is_ours() -> None:
    """A child that burns a CPU counts as ours once it has ended."""
    if (before := machine.moment()) is None:
        pytest.skip("no /proc/stat")
    subprocess.run(["sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"], check=True)
    after = machine.moment()
    assert after and after.ours - before.ours > 0.05


def test_energy_from_a_made_up_tree(tmp_path: Path) -> None:
    def zone(name: str, kind: str, value: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "name").write_text(f"{kind}\n")
        (folder / "energy_uj").write_text(f"{value}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
        return folder / "energy_uj"

    package, dram = zone("intel-rapl:0", "package-0", 9_000_000), zone("intel-rapl:0:1", "dram", 100)
    core, psys = zone("intel-rapl:0:0", "core", 5), zone("intel-rapl:1", "psys", 7)
    rapl = Rapl(tmp_path)
    before = rapl.read()
    for path, value in ((package, 500_000), (dram, 250_100), (core, 999_999), (psys, 999_999)):
        path.write_text(f"{value}\n")
    # the package's counter began again: 1 J to its end, 0.5 J after; core is in package, psys is more than the CPU
    assert rapl.joules(before, rapl.read()) == pytest.approx(1.5 + 0.25)
    package.unlink()
    assert rapl.joules(before, rapl.read()) is None
    nothing = Rapl(tmp_path / "nowhere")
    assert nothing.read() is None and nothing.joules(None, None) is None


def test_probe_reads_every_word(rng: np.random.Generator) -> None:
    for n in (0, 7, 8, 255, 256, 1000, 4096 + 13):
        buffer = rng.integers(0, 256, n + 3, np.uint8)
        for at in (0, 3):  # any alignment
            data = buffer[at : at + n]
            words = np.frombuffer(data.tobytes()[: n // 8 * 8], np.uint64)
            assert native.read_sum(data) == int(words.sum(dtype=np.uint64))


def test_probe_of_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: set[int] = set()
    read = native.read_sum
    monkeypatch.setattr(native, "read_sum", lambda data: calls.add(threading.get_ident()) or read(data))
    monkeypatch.setattr(machine, "free_memory", lambda: 200 << 20)  # 25 MB a thread
    assert machine.read_bandwidth(2, 0.01) > 0 and len(calls) == 2
    with pytest.raises(BenchError, match="close other programs"):
        machine.read_bandwidth(64, 0.01)
    with pytest.raises(BenchError, match="at least 1"):
        machine.read_bandwidth(0)


# ---- bytes a token ----


def test_bytes_of_a_token(tmp_path: Path) -> None:
    def count(name: str, extra: dict[str, tuple[int, ...]] | None = None, **numbers: int) -> int:
        with GgufSource(write_llama(tmp_path / name, extra, **numbers)) as source:
            return token_bytes(source)

    block = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
    head = 4 * VOCAB * WIDTH
    assert count("tied.gguf") == block + head  # the embedding is the head; norms are no matrices
    assert count("untied.gguf", {"output": (VOCAB, WIDTH)}) == block + head
    experts = {"blk.0.ffn_up_exps": (8, FFN, WIDTH)}
    assert count("moe.gguf", experts, expert_count=8, expert_used_count=2) == block + head + 4 * 2 * FFN * WIDTH
    assert count("all.gguf", experts) == block + head + 4 * 8 * FFN * WIDTH
    more = {"per_layer_token_embd": (VOCAB, 256), "blk.1.attn_q": (WIDTH, WIDTH)}
    assert count("mtp.gguf", more, block_count=2, nextn_predict_layers=1) == block + head


# ---- the real thing ----


@pytest.mark.runtime
def test_bench_of_two_files_and_taking_up(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[rounds.Round] = []
    order: list[str] = []
    run = rounds._llama_bench
    monkeypatch.setattr(rounds, "_llama_bench", lambda f, s, t: order.append(f.label) or run(f, s, t))
    monkeypatch.setattr(machine, "PROBE_BYTES", 1 << 22)
    monkeypatch.setattr(machine, "MIN_PROBE_BYTES", 1 << 20)
    seen: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int, detail: str) -> None:
        seen.append((done, total))

    b = bench(files, prompt=(8,), generate=(4, 4), threads=(1,), rounds=2, keep=kept.append, progress=progress)
    assert order == ["tiny", "tiny-f32", "tiny-f32", "tiny"]  # the order turns
    assert [d for d, _ in seen] == sorted(d for d, _ in seen) and seen[-1] == (10, 10)
    data = json.loads(json.dumps(b.as_dict(), allow_nan=False))
    assert [r["label"] for r in data["rows"]] == ["tiny", "tiny-f32"]
    for row, path in zip(data["rows"], files, strict=True):
        assert [(s["test"], len(s["samples"])) for s in row["speed"]] == [("pp8", 2), ("tg4", 2)]
        assert all(s["low"] > 0 for s in row["speed"]) and row["size"] == path.stat().st_size
        assert row["load_s"] > 0 and row["ttft_s"] > 0 and row["peak_memory"] > 10 << 20
    assert data["rows"][0]["token_bytes"] < data["rows"][1]["token_bytes"]
    assert data["rows"][0]["ratios"]["tiny-f32"].keys() == {"pp8 t1", "tg4 t1"}

    order.clear()
    stored = json.loads(json.dumps(kept))
    again = bench(files, prompt=(8,), generate=(4,), threads=(1,), rounds=2, done=stored)
    assert not order and again.as_dict()["rows"] == b.as_dict()["rows"]  # nothing measured, the same figures
    stored[0]["sizes"]["tiny"] += 1
    del stored[1]["speed"]["tiny"]["tg4 t1"]
    last: list[rounds.Round] = []
    with pytest.raises(KeyboardInterrupt):  # rounds of another file or setting do not count; Ctrl-C goes through
        bench(
            files, prompt=(8,), generate=(4,), threads=(1,), rounds=1, done=[*stored, {}, None], keep=_interrupt(last)
        )
    assert last[0]["number"] == 0


def _interrupt(into: list[rounds.Round]) -> Callable[[rounds.Round], None]:
    def keep(found: rounds.Round) -> None:
        into.append(found)
        raise KeyboardInterrupt

    return keep


def test_bad_arguments_and_files(files: list[Path], tmp_path: Path) -> None:
    for match, changes in (
        ("0 rounds", {"rounds": 0}),
        ("nothing to measure", {"prompt": (), "generate": ()}),
        ("0 threads", {"threads": (0,)}),
        ("-1 tokens", {"prompt": (-1,)}),
        ("each another", {"labels": ["a"]}),
    ):
        with pytest.raises(BenchError, match=match):
            bench(files, **changes)
    with pytest.raises(BenchError, match="name one"):
        bench([])
    with pytest.raises(InputError, match="nowhere"):
        bench([tmp_path / "nowhere.gguf"])
    assert bench_module._labels([files[0], files[0]], None) == ["tiny", "tiny (2)"]


@pytest.mark.runtime
def test_a_file_that_does_not_load_is_named(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "odd.gguf", {"blk.0.attn_odd": (4, 4)})  # one tensor too many
    file = File(path, "odd", 1, 1)
    with pytest.raises(BenchError, match=r"odd\.gguf: llama-bench failed: .*wrong number of tensors"):
        rounds._llama_bench(file, Settings((1,), (), (1,), 1), 1)
    with pytest.raises(BenchError, match=r"odd\.gguf: loading failed: .*wrong number of tensors"):
        rounds._first_token(file, Settings((1,), (), (1,), 1))
    for text in ("", "[]", "[{}]", '[{"n_prompt": 1}]'):
        with pytest.raises(BenchError, match="lacks a test or is not JSON"):
            rounds.parse(text, Settings((1,), (), (1,), 1), 1, path)
    with pytest.raises(BenchError, match="ended by SIGKILL; memory is likely short"):
        rounds._run(["sh", "-c", "kill -9 $$"], file, "it")


@pytest.mark.runtime
def test_energy_of_a_token(files: list[Path]) -> None:
    class Meter(Rapl):  # 3 J between two readings
        readings = 0

        def read(self) -> dict[Path, int]:
            self.readings += 3_000_000
            return {Path(): self.readings}

    assert _load_child.measure(files[0], 1, 4, 6, Meter())["energy"] == pytest.approx(0.5)
    assert _load_child.measure(files[0], 1, 4, 0, Meter())["energy"] is None


@pytest.mark.runtime
def test_command(files: list[Path], cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli("bench", files[0], "--prompt", "", "--generate", "4", "--threads", "1", "--rounds", "1", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and events[0]["event"] == "progress" and events[-1]["event"] == "done", done.stderr
    assert events[-1]["rows"][0]["speed"][0]["test"] == "tg4"
    assert cli("bench", files[0], "--threads", "two").returncode == 2


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    command.print_bench(made_up({"ours": [1200.0] * 5, "theirs": [600.0, 700.0, 600.0, 600.0, 601.0]}))
    command.print_bench(made_up({"ours": [12.0, 9.0], "theirs": [6.0, 8.0]}))
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "tg8 t1 t/s",
        "first token s",
        " 1200 ",
        "600.0 (0.50x) ",
        "7.0 (0.69x?)",
        "median of 2 rounds; in brackets",
        "memory, 1 thread: 10.0 GB/s; decoding reaches ours 6000%, theirs 3000% of it",
        "2 cores, 17.2 GB, os, kernel",
        "warning: 2 rounds: ",
    ):
        assert text in out
    assert "J/token" not in out  # nothing is known of it


@pytest.mark.runtime
def test_interrupted_command_shows_what_is_finished(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = made_up({"tiny": [10.0] * 3}).rounds[0]
    finished["sizes"]["tiny"] = files[0].stat().st_size

    def one_round(settings: Settings, known: list[File], number: int, report: object) -> rounds.Round:
        if number == 2:
            raise KeyboardInterrupt
        return finished

    monkeypatch.setattr(bench_module, "one_round", one_round)
    with pytest.raises(SystemExit) as stop:
        command.bench(files[:1], prompt="", generate="8", threads="1", rounds=5)
    told = capsys.readouterr()
    assert stop.value.code == 130 and "2 of 5 rounds were measured" in told.err
    assert "median of 2 rounds" in told.out
