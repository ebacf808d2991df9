"""What the tap shows: the inputs of a tiny model's matrices, against arithmetic on its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from bench_models import write_llama
from talking_model import LAYERS, write_talking_model

from ptqtp_gguf.errors import InputError, RuntimeMissing
from ptqtp_gguf.files.gguf import Reader
from ptqtp_gguf.llamacpp import Model, Product, Tap, tap
from ptqtp_gguf.llamacpp.tap import OUTPUT

pytestmark = pytest.mark.runtime
LENGTH = 12
TOKENS = np.array([1, 260, 270, 261, 280, 262, 269, 273, 260, 265, 284, 271], np.int32)  # of the talking model
FEW = np.array([1, 7, 3, 60, 7, 12, 5], np.int32)  # of those with 64
EXPERTS, USED = 4, 2
KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SHOWN = ("attn_q", "attn_output", "ffn_gate", "ffn_down")  # one name for each distinct input


def write_experts(path: Path) -> Path:
    """A random llama of one block whose feed-forward part is four experts, two for a token."""
    rng, width, hidden, vocabulary = np.random.default_rng(2), 64, 96, 64
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(64)
    w.add_embedding_length(width)
    w.add_block_count(1)
    w.add_feed_forward_length(hidden)
    w.add_head_count(2)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(USED)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"t{i}" for i in range(vocabulary)])
    w.add_token_scores([0.0] * vocabulary)
    w.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, width), "output": (vocabulary, width)}
    shapes |= {f"blk.0.attn_{n}": (width, width) for n in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{n}_exps": (EXPERTS, hidden, width) for n in ("gate", "up")}
    shapes |= {"blk.0.ffn_down_exps": (EXPERTS, width, hidden), "blk.0.ffn_gate_inp": (EXPERTS, width)}
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", (rng.normal(size=shape) * 0.2).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        w.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talking_model(tmp_path_factory.mktemp("tap") / "m.gguf")


@pytest.fixture
def model(file: Path) -> Iterator[Model]:
    with Model(file) as opened:
        yield opened


@pytest.fixture
def weights(file: Path) -> dict[str, np.ndarray]:
    return weights_of(file)


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """float64 (R, C), or (E, R, C)."""
    with Reader(path) as r:
        return {t.name: r.rows_f32(t).astype(np.float64).reshape(t.shape[::-1]) for t in r.tensors}


def everything() -> list[str]:
    return [*(f"blk.{i}.{n}.weight" for i in range(LAYERS) for n in KINDS), OUTPUT]


class Seen(list[Product]):
    """All that was shown, copied: it lasts for the call only."""

    def __call__(self, p: Product) -> None:
        self.append(Product(p.weight, p.x.copy(), None if p.experts is None else p.experts.copy()))

    def inputs(self) -> dict[str, np.ndarray]:
        """Batches joined."""
        names = dict.fromkeys(p.weight for p in self)
        return {n: np.concatenate([p.x for p in self if p.weight == n]) for n in names}


def silu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.exp(-x)))


def normed(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5))


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """But for the rounding of float32 sums, and of a matrix' inputs where the runtime's kernel does that."""
    return bool(np.abs(got - want).max() <= 0.01 * np.abs(want).max())


# ---- what is shown ----


def test_each_input_once_in_the_order_of_computation(model: Model) -> None:
    seen = Seen()
    with Tap(model, everything(), seen, LENGTH, LENGTH, threads=1) as it:
        it.run(TOKENS)
        assert [p.weight for p in seen] == [*(f"blk.{i}.{n}.weight" for i in range(LAYERS) for n in SHOWN), OUTPUT]
        assert all(p.x.dtype == np.float32 and p.experts is None for p in seen)
        assert [p.x.shape for p in seen] == [(LENGTH, 64), (LENGTH, 64), (LENGTH, 64), (LENGTH, 96)] * LAYERS + [
            (LENGTH, 64)
        ]


def test_what_shares_an_input(model: Model) -> None:
    seen = Seen()
    with Tap(model, everything(), seen, LENGTH, LENGTH, threads=1) as it:
        assert it.same == {}
        it.run(TOKENS)
        leader = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
        blocks = {f"blk.{i}.{n}.weight": f"blk.{i}.{leader.get(n, n)}.weight" for i in range(LAYERS) for n in KINDS}
        assert it.same == {**blocks, OUTPUT: OUTPUT}


def test_values(model: Model, weights: dict[str, np.ndarray]) -> None:
    seen = Seen()
    with Tap(model, everything(), seen, LENGTH, LENGTH, threads=1) as it:
        it.run(TOKENS)
    x = seen.inputs()
    assert close(x["blk.0.attn_q.weight"], normed(weights["token_embd.weight"][TOKENS]))
    for i in range(LAYERS):
        g, u = (x[f"blk.{i}.ffn_gate.weight"] @ weights[f"blk.{i}.ffn_{n}.weight"].T for n in ("gate", "up"))
        assert close(x[f"blk.{i}.ffn_down.weight"], silu(g) * u)
    v = x["blk.0.attn_q.weight"] @ weights["blk.0.attn_v.weight"].T
    assert close(x["blk.0.attn_output.weight"][:1], v[:1])  # the first token sees itself alone


def test_the_input_of_the_output(model: Model, weights: dict[str, np.ndarray]) -> None:
    """Of every token; with it the logits are those of the model."""
    seen = Seen()
    with Tap(model, [OUTPUT], seen, LENGTH, LENGTH, threads=1) as it:
        it.run(TOKENS)
    with model.context(LENGTH, threads=1) as context:
        logits = context.feed(TOKENS, np.arange(LENGTH, dtype=np.int32), np.ones(LENGTH, bool)).copy()
    assert [p.weight for p in seen] == [OUTPUT]
    assert close(seen[0].x @ weights[OUTPUT].T, logits)


def test_the_output_of_a_tied_model(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    head, seen = weights_of(path)["token_embd.weight"], Seen()
    with Model(path) as model:
        with Tap(model, [OUTPUT, "blk.0.ffn_down.weight"], seen, len(FEW), len(FEW), threads=1) as it:
            it.run(FEW)
        with model.context(len(FEW), threads=1) as context:
            logits = context.feed(FEW, np.arange(len(FEW), dtype=np.int32), np.ones(len(FEW), bool)).copy()
    assert [p.weight for p in seen] == ["blk.0.ffn_down.weight", OUTPUT]
    assert close(seen[1].x @ head.T, logits)


class Spy(Tap):
    """Notes the nodes that the runtime comes to."""

    nodes: list[str]

    def _ask(self, t: tap._Tensor) -> bool:
        self.nodes.append(t.name.decode())
        return super()._ask(t)


@pytest.mark.parametrize("wanted", [[OUTPUT], ["blk.0.attn_q.weight"], []])
def test_the_computation_ends_before_the_output(model: Model, wanted: list[str]) -> None:
    seen = Seen()
    with Spy(model, wanted, seen, LENGTH, LENGTH, threads=1) as it:
        it.nodes = []
        it.run(TOKENS)
        assert f"l_out-{LAYERS - 1}" in it.nodes and "result_output" not in it.nodes
    assert [p.weight for p in seen] == wanted


def test_only_what_is_wanted(model: Model) -> None:
    """The first of those that are wanted gives its name."""
    seen = Seen()
    wanted = ["blk.1.attn_v.weight", "blk.1.attn_k.weight", "blk.0.ffn_up.weight", "no.such.weight"]
    with Tap(model, wanted, seen, LENGTH, LENGTH, threads=1) as it:
        it.run(TOKENS)
        assert sorted(it.same) == sorted(wanted[:3])
        assert it.same[wanted[0]] == it.same[wanted[1]] and it.same[wanted[0]] in wanted[:2]
        assert it.same[wanted[2]] == wanted[2]
    assert [p.weight for p in seen] == ["blk.0.ffn_up.weight", it.same[wanted[0]]]


# ---- batches and sequences ----


def test_batches_of_a_sequence(model: Model) -> None:
    """5, 5 and 2 tokens: each sees those of the batches before it."""
    whole, parts = Seen(), Seen()
    for seen, batch in ((whole, LENGTH), (parts, 5)):
        with Tap(model, everything(), seen, LENGTH, batch, threads=1) as it:
            it.run(TOKENS)
    assert set(Counter(p.weight for p in parts).values()) == {3}
    assert [len(p.x) for p in parts if p.weight == OUTPUT] == [5, 5, 2]
    a, b = whole.inputs(), parts.inputs()
    assert list(a) == list(b) and all(close(b[n], a[n]) for n in a)


def test_a_sequence_knows_nothing_of_the_one_before(model: Model) -> None:
    first, again, alone = Seen(), Seen(), Seen()
    now = first
    with Tap(model, everything(), lambda p: now(p), LENGTH, 5, threads=1) as it:
        it.run(TOKENS)
        now = again
        it.run(TOKENS)
        now = alone
        it.run(TOKENS[3:7])  # shorter than it may be
    a, b, c = first.inputs(), again.inputs(), alone.inputs()
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert len(c[OUTPUT]) == 4 and not close(c[OUTPUT], a[OUTPUT][3:7])
    assert close(c["blk.0.attn_q.weight"], a["blk.0.attn_q.weight"][3:7])  # which has no place nor past


def test_threads(model: Model) -> None:
    one, two = Seen(), Seen()
    for seen, threads in ((one, 1), (two, 2)):
        with Tap(model, everything(), seen, LENGTH, LENGTH, threads=threads) as it:
            it.run(TOKENS)
    a, b = one.inputs(), two.inputs()
    assert list(a) == list(b) and all(close(b[n], a[n]) for n in a)


def test_two_at_once(model: Model) -> None:
    """Of one model, each with its own."""
    a, b = Seen(), Seen()
    with Tap(model, [OUTPUT], a, LENGTH, LENGTH, 1) as one, Tap(model, everything(), b, LENGTH, LENGTH, 1) as other:
        one.run(TOKENS)
        other.run(TOKENS)
        one.close()
        one.close()
        other.run(TOKENS)
    assert len(a) == 1 and len(b) == 2 * (len(SHOWN) * LAYERS + 1) and np.array_equal(a[0].x, b[-1].x)


# ---- experts ----


def test_experts(tmp_path: Path) -> None:
    path, seen = write_experts(tmp_path / "m.gguf"), Seen()
    w, n = weights_of(path), len(FEW)
    names = {k: f"blk.0.ffn_{k}.weight" for k in ("gate_inp", "gate_exps", "up_exps", "down_exps")}
    with Model(path) as model, Tap(model, list(names.values()), seen, n, n, threads=1) as it:
        it.run(FEW)
        shared = it.same[names["gate_exps"]]
        assert it.same[names["up_exps"]] == shared and shared in (names["gate_exps"], names["up_exps"])
        assert it.same[names["down_exps"]] == names["down_exps"] and it.same[names["gate_inp"]] == names["gate_inp"]
    by_name = {p.weight: p for p in seen}
    assert [p.weight for p in seen] == [names["gate_inp"], shared, names["down_exps"]]
    router, gate, down = (by_name[k] for k in (names["gate_inp"], shared, names["down_exps"]))
    assert gate.x.shape == (n, 1, 64) and down.x.shape == (n, USED, 96) and router.experts is None
    assert gate.experts is not None and down.experts is not None
    assert gate.experts.dtype == np.int32 and gate.experts.shape == (n, USED)
    assert np.array_equal(gate.experts, down.experts) and np.array_equal(gate.x[:, 0], router.x)
    best = np.argsort(-(router.x @ w[names["gate_inp"]].T), axis=1)[:, :USED]
    assert np.array_equal(best, gate.experts) and len(np.unique(best)) > USED
    for t in range(n):
        for u, e in enumerate(gate.experts[t]):
            x = gate.x[t, 0]
            assert close(down.x[t, u], silu(w[names["gate_exps"]][e] @ x) * (w[names["up_exps"]][e] @ x))


# ---- what goes wrong ----


@pytest.mark.parametrize(
    "error", [KeyError("mine"), MemoryError(), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("at", ["blk.0.attn_q.weight", "blk.1.ffn_down.weight", OUTPUT])
def test_what_the_callback_raises_comes_out(model: Model, error: BaseException, at: str) -> None:
    seen = Seen()

    def fail(p: Product) -> None:
        seen(p)
        if p.weight == at:
            raise error

    with Tap(model, everything(), fail, LENGTH, 5, threads=1) as it:
        with pytest.raises(type(error)) as e:
            it.run(TOKENS)
        assert e.value is error
        assert Counter(p.weight for p in seen)[at] == 1 and seen[-1].weight == at  # nothing is shown after it
    with Tap(model, everything(), seen, LENGTH, 5, threads=1) as it:  # the model is as it was
        seen.clear()
        it.run(TOKENS)
        assert len(seen) == 3 * (len(SHOWN) * LAYERS + 1)


def test_a_run_after_one_that_failed(model: Model) -> None:
    """An error is raised once."""
    seen, errors = Seen(), [ValueError("once")]

    def fail(p: Product) -> None:
        if errors:
            raise errors.pop()
        seen(p)

    with Tap(model, [OUTPUT], fail, LENGTH, LENGTH, threads=1) as it:
        with pytest.raises(ValueError, match="once"):
            it.run(TOKENS)
        it.run(TOKENS)
    assert [p.weight for p in seen] == [OUTPUT]


def test_a_token_that_there_is_not(model: Model) -> None:
    seen = Seen()
    with Tap(model, [OUTPUT], seen, LENGTH, LENGTH, threads=1) as it:
        with pytest.raises(InputError, match=r"m\.gguf: the runtime cannot run 2 tokens: ") as e:
            it.run(np.array([1, model.n_vocab], np.int32))
        assert "\n" not in str(e.value) and not seen
        it.run(TOKENS)
    assert len(seen) == 1


def test_no_room(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
    with pytest.raises(InputError, match=r"m\.gguf: the runtime makes no context of 12 tokens: no memory\?$"):
        Tap(model, [OUTPUT], Seen(), LENGTH, LENGTH, threads=1)


def test_another_layout_of_tensors(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime whose tensors are of another size is not read at all."""
    monkeypatch.setattr(tap, "OBJECT_BYTES", tap.OBJECT_BYTES + 8)
    with pytest.raises(RuntimeMissing, match="the runtime's tensors are not those that this program reads"):
        Tap(model, [OUTPUT], Seen(), LENGTH, LENGTH, threads=1)
