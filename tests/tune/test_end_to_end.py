"""Tuning end to end, on tiny models: against plain torch, to the end, interrupted, stopped, and where it cannot go."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptqtp_gguf.codec import TP2_1, TP2_2, TensorType, TritPlanes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ptqtp_gguf.codec.tp2_1 import scale_to_float  # noqa: E402
from ptqtp_gguf.errors import OutputError, TuneError  # noqa: E402
from ptqtp_gguf.plan.tuning import TuneSettings  # noqa: E402
from ptqtp_gguf.quantize import search  # noqa: E402
from ptqtp_gguf.quantize.gptq import Planes  # noqa: E402
from ptqtp_gguf.tune.end_to_end import evaluate_kl, tune  # noqa: E402
from ptqtp_gguf.tune.student import Student  # noqa: E402

VOCABULARY, LENGTH = 160, 12
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    initializer_range=0.2,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": dict(tie_word_embeddings=False),  # embedding and head are quantized too, each by itself
    "Qwen2": dict(tie_word_embeddings=True),  # biases; one quantized matrix for embedding and head
    "Gemma2": dict(final_logit_softcapping=5.0, query_pre_attn_scalar=16),  # norms of 1 + w, capped logits
}
QUICK = TuneSettings(steps=12, batch=4, warmup=2, lr=2e-2, lr_vectors=1e-2, every=4, patience=9)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(family: str, folder: Path, **more: object) -> Any:
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:  # vectors that a wrong handling of would show
                p.add_(torch.randn_like(p) * 0.2)
            if "embed" in name or "lm_head" in name:
                p.mul_(0.5)
    if family == "Qwen2":  # bf16, as most checkpoints are; the values are exact in float32
        for p in model.parameters():
            p.data = p.data.bfloat16().float()
        copy.deepcopy(model).bfloat16().save_pretrained(folder)  # a copy: buffers would be rounded too
    else:
        model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


def planes_of(model: Any, kind: TensorType = TP2_1) -> dict[str, Planes]:
    assert kind.to_levels
    planes = {}
    plain = type(model.get_input_embeddings()) is torch.nn.Embedding  # not Gemma's, which multiplies
    for name, p in model.named_parameters():
        if (
            p.ndim == 2
            and p.shape[1] % 32 == 0
            and ("proj" in name or "lm_head" in name or ("embed" in name and plain))
        ):
            w = p.detach().numpy()
            digits, codes = search.FITS[kind.id](w.reshape(-1, 32), None)
            levels = kind.to_levels(digits).reshape(w.shape)
            planes[name] = Planes(levels, codes.reshape(len(w), -1))
    return planes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, dict[str, Planes]]]:
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = make_model(family, folder)
        found[family] = (folder, model, planes_of(model))
    return found


@pytest.fixture(scope="module")
def text() -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randint(0, VOCABULARY, (12, LENGTH), generator=g),
        torch.randint(0, VOCABULARY, (5, LENGTH), generator=g),
    )


def weights(p: Planes | TritPlanes) -> Any:
    s = scale_to_float(p.codes).repeat(32, axis=1)
    return torch.from_numpy(s * p.levels.astype(np.float32))


def plain_kl(model: Any, ids: Any, changed: dict[str, Any]) -> Any:
    """The formula, with transformers and torch alone."""
    want = torch.log_softmax(model(ids).logits, -1)
    have = torch.log_softmax(torch.func.functional_call(model, changed, (ids,)).logits, -1)
    kl = torch.nn.functional.kl_div(have, want, log_target=True, reduction="sum") / ids.numel()
    return kl


@pytest.mark.parametrize("family", FAMILIES)
def test_falls_and_returns_what_it_ran(family: str, models: Any, text: tuple[Any, Any]) -> None:
    folder, model, planes = models[family]
    windows, _ = text
    told: list[tuple[str, int, int, str]] = []
    got = tune(folder, planes, windows, windows, QUICK, progress=lambda *a: told.append(a))
    assert [m.step for m in got.history] == [0, 4, 8, 12]
    best = min(m.held_out for m in got.history)
    assert best < 0.8 * got.history[0].held_out
    assert sum((got.planes[n].codes != p.codes).any() for n, p in planes.items()) == len(planes)
    for name, p in planes.items():
        assert np.array_equal(got.planes[name].levels, p.levels) and got.planes[name].codes.dtype == np.uint8
    assert set(got.vectors) == {n for n, p in model.named_parameters() if p.ndim == 1}
    changed = {**{n: weights(p) for n, p in got.planes.items()}, **got.vectors}
    assert plain_kl(model, windows, changed) == pytest.approx(best, abs=2e-5)
    assert evaluate_kl(folder, got.planes, windows, got.vectors) == pytest.approx(best, abs=1e-6)
    assert told[-1][:3] == ("tuning", 12, 12) and told[-1][3].startswith("KL 0.") and "held out 0." in told[-1][3]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_formula(family: str, models: Any, text: tuple[Any, Any]) -> None:
    folder, model, planes = models[family]
    ids = text[0][:3]
    few = 7 * 4 * 5 * VOCABULARY  # logits of seven positions at a time: an uneven number of pieces
    student = Student(folder, planes, "cpu", bf16=False, vectors=True, latent=0.0, logits_bytes=few)
    assert student.chunk == 7 and student.latent is not None
    scale = {n: torch.from_numpy(scale_to_float(p.codes)).requires_grad_() for n, p in planes.items()}
    weight = {
        n: (s[..., None] * torch.from_numpy(planes[n].levels).float().unflatten(1, (-1, 32))).flatten(1)
        for n, s in scale.items()
    }
    for w in weight.values():
        w.retain_grad()
    vectors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.ndim == 1}
    want = plain_kl(model, ids, {**weight, **vectors})
    want.backward()
    want = want.detach()
    for window in ids.split(2):  # gradients add up over micro-batches
        student.kl(window, 1 / ids.numel())
    assert float(sum(student.kl(w) for w in ids.split(1))) / ids.numel() == pytest.approx(float(want), rel=1e-5)
    assert student.names == list(planes)
    for i, name in enumerate(planes):
        same = dict(rtol=1e-3, atol=1e-6 + 1e-4 * float(scale[name].grad.abs().max()))
        assert torch.allclose(student.scales.views(student.scales.grad)[i], scale[name].grad, **same)
        latent = weight[name].grad * scale[name].detach().repeat_interleave(32, 1)
        same = dict(rtol=1e-3, atol=1e-6 + 1e-4 * float(latent.abs().max()))
        assert torch.allclose(student.latent.views(student.latent.grad)[i], latent, **same)
    for v, g in zip(student.vectors, student.vector_values.views(student.vector_values.grad), strict=True):
        assert torch.allclose(g, vectors[v.name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_the_student_has_the_file_s_embedding_and_head(family: str, models: Any, text: tuple[Any, Any]) -> None:
    folder, model, planes = models[family]
    ends = ["model.embed_tokens.weight", *(["lm_head.weight"] if family == "Llama" else [])]
    inner = {n: p for n, p in planes.items() if n not in ends}
    fixed = {n: (model.get_parameter(n) * 8).round() / 8 for n in ends}
    changed = {**{n: weights(p) for n, p in inner.items()}, **fixed}
    student = Student(folder, inner, "cpu", bf16=False, vectors=True, latent=None, logits_bytes=4000, fixed=fixed)
    got = float(student.kl(text[0])) / text[0].numel()
    assert got == pytest.approx(float(plain_kl(model, text[0], changed)), rel=1e-5)
    without = float(plain_kl(model, text[0], {n: weights(p) for n, p in inner.items()}))
    assert abs(got - without) > 0.01 * without


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_close_to_float32(family: str, models: Any, text: tuple[Any, Any]) -> None:
    """The arithmetic of CUDA, as far as a CPU has it."""
    folder, _, planes = models[family]
    ids, grads, kls = text[0][:3], [], []
    for bf16 in (False, True):
        student = Student(folder, planes, "cpu", bf16=bf16, vectors=True, latent=0.0, logits_bytes=1 << 20)
        student.check(ids[0])
        kls.append(float(student.kl(ids, 1 / ids.numel()).detach()) / ids.numel())
        parts = (student.scales, student.vector_values, student.latent)
        grads.append([f.grad.clone() for f in parts if f is not None])
    assert kls[1] == pytest.approx(kls[0], rel=0.02)
    for exact, rounded in zip(*grads, strict=True):
        assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.99


@pytest.mark.parametrize(("kind", "rate"), [(TP2_1, 1e-2), (TP2_2, 1e-1)], ids=["TP2_1", "TP2_2"])
def test_levels_can_be_trained(models: Any, text: Any, kind: TensorType, rate: float) -> None:
    folder, model, planes = models["Llama"]
    planes = planes if kind == TP2_1 else planes_of(model, kind)
    windows, _ = text
    settings = dataclasses.replace(QUICK, train_planes=True, latent_start=1.0, lr_planes=rate)
    got = tune(folder, planes, windows, windows, settings, kind=kind)
    moved = np.mean([np.mean(got.planes[n].levels != p.levels) for n, p in planes.items()])
    assert 0.001 < moved < 0.3
    assert kind.from_levels
    for p in got.planes.values():  # what a file can hold
        assert (kind.from_levels(np.asarray(p.levels)) <= 8).all()
    best = min(m.held_out for m in got.history)
    assert best < 0.8 * got.history[0].held_out
    changed = {**{n: weights(p) for n, p in got.planes.items()}, **got.vectors}
    assert plain_kl(model, windows, changed) == pytest.approx(best, abs=2e-5)


@pytest.mark.parametrize("kind", ["scales", "levels", "log"])
def test_taken_up_equals_one_go(kind: str, models: Any, text: tuple[Any, Any], tmp_path: Path) -> None:
    folder, _, planes = models["Qwen2"]
    changes: dict[str, dict[str, Any]] = {"scales": {}, "levels": {"train_planes": True}, "log": {"form": "log"}}
    settings = dataclasses.replace(QUICK, steps=8, **changes[kind])
    whole = tune(folder, planes, *text, settings)
    state = tmp_path / "state.safetensors"
    calls = []

    def interrupt(stage: str, step: int, steps: int, detail: str) -> None:
        calls.append(step)
        if step in (3, 4) and step not in calls[:-1]:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tune(folder, planes, *text, settings, progress=interrupt, state=state)
        assert [p.name for p in tmp_path.iterdir()] == [state.name]
    assert calls.count(2) == 1, "the second run started over"
    for _ in range(2):  # the second time it is finished already
        got = tune(folder, planes, *text, settings, progress=interrupt, state=state)
        assert repr(got.history) == repr(whole.history)
        for name in planes:
            assert np.array_equal(got.planes[name].levels, whole.planes[name].levels)
            assert np.array_equal(got.planes[name].codes, whole.planes[name].codes)
        assert all(torch.equal(got.vectors[n], v) for n, v in whole.vectors.items())
    assert calls.count(7) == 1
    if kind == "scales":
        other = dataclasses.replace(settings, lr=1e-3)
        with pytest.raises(
            TuneError, match=r"begun with other settings; resume it as it was begun, or remove the file"
        ):
            tune(folder, planes, *text, other, state=state)
        with pytest.raises(OutputError, match="does not exist"):
            tune(folder, planes, *text, settings, state=tmp_path / "no" / "state")
        state.write_bytes(state.read_bytes()[:1000])
        with pytest.raises(TuneError, match="not the state of a tuning"):
            tune(folder, planes, *text, settings, state=state)


def test_vectors_that_may_not_change(models: Any, text: tuple[Any, Any]) -> None:
    folder, model, planes = models["Qwen2"]
    name = "model.layers.1.self_attn.q_proj.bias"
    got = tune(folder, planes, text[0], text[0], QUICK, only_vectors={name})
    assert set(got.vectors) == {name} and not torch.equal(got.vectors[name], model.get_parameter(name))
    changed = {**{n: weights(p) for n, p in got.planes.items()}, **got.vectors}
    best = min(m.held_out for m in got.history)
    assert plain_kl(model, text[0], changed) == pytest.approx(best, abs=2e-5)


def test_stops_early_and_keeps_the_best(models: Any, text: tuple[Any, Any]) -> None:
    folder, _, planes = models["Llama"]
    settings = dataclasses.replace(QUICK, steps=40, lr=0.3, lr_vectors=0.3, every=2, patience=2)
    got = tune(folder, planes, *text, settings)
    held = [m.held_out for m in got.history]
    best = held.index(min(held))
    assert len(held) - 1 - best == 2 and got.history[-1].step < 40
    assert evaluate_kl(folder, got.planes, text[1], got.vectors) == pytest.approx(min(held), abs=1e-6)


def test_values_that_are_not_finite(models: Any, text: tuple[Any, Any], tmp_path: Path) -> None:
    folder, _, planes = models["Llama"]
    settings = dataclasses.replace(QUICK, lr_vectors=1e37, warmup=1)
    got = tune(folder, planes, *text, settings)
    assert len(got.notes) == 1 and got.notes[0].startswith("stopped at step ") and "lower lr" in got.notes[0]
    assert all(np.array_equal(got.planes[n].codes, p.codes) for n, p in planes.items())
    model = make_model("Llama", tmp_path)
    model.model.embed_tokens.weight.data[:] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(TuneError, match=r"are the planes of this model|logits of"):
        tune(tmp_path, planes, *text, QUICK)


def test_out_of_memory_halves_the_micro_batch(
    models: Any, text: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, planes = models["Qwen2"]
    whole = tune(folder, planes, *text, dataclasses.replace(QUICK, steps=4))
    real, seen, fits = Student.hidden, [], 1

    def hidden(self: Any, ids: Any) -> Any:
        if len(ids) > fits and ids.shape[1] == LENGTH:
            raise torch.cuda.OutOfMemoryError
        seen.append(len(ids))
        return real(self, ids)

    monkeypatch.setattr(Student, "hidden", hidden)
    got = tune(folder, planes, *text, dataclasses.replace(QUICK, steps=4))
    assert max(seen) == 1
    assert got.history[-1].held_out == pytest.approx(whole.history[-1].held_out, rel=0.02)
    fits = 0
    with pytest.raises(TuneError, match=f"out of memory of cpu with one window of {LENGTH} tokens"):
        tune(folder, planes, *text, QUICK)


def test_what_does_not_fit(models: Any, text: tuple[Any, Any]) -> None:
    folder, _, planes = models["Llama"]
    windows, held = text
    name = "model.layers.0.self_attn.q_proj.weight"
    good = planes[name]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model.layers.9.x.weight": good}, "a parameter that this model does not have"),
        (
            {name: Planes(good.levels[:-1], good.codes)},
            r"levels \(63, 64\) and codes \(64, 2\) for a weight of 64 x 64",
        ),
        ({name: Planes(good.levels.astype(np.int32), good.codes)}, r"levels of torch\.int32"),
        ({name: Planes(np.full_like(good.levels, 7), good.codes)}, "a level that is none of 0, 1, 2, 3, 4, 5, 6 and"),
        ({"model.norm.weight": good}, "none of the 1 planes stands for a linear layer or embedding"),
    ]
    for given, message in wrong:
        with pytest.raises(TuneError, match=message) as e:
            tune(folder, given, windows, held, QUICK)
        assert "\n" not in str(e.value)
    cases: list[tuple[Any, dict[str, Any], str, str]] = [
        (windows.float(), {}, "cpu", "expected int64"),
        (windows + VOCABULARY, {}, "cpu", "was the text tokenized for another model"),
        (windows, dict(form="cubic"), "cpu", "there are linear, log"),
        (windows, dict(steps=0), "cpu", "steps 0; at least 1"),
        (windows, {}, "cuda:77", "no device 'cuda:77' here"),
    ]
    for ids, changes, device, message in cases:
        with pytest.raises(TuneError, match=message) as e:
            tune(folder, planes, ids, held, dataclasses.replace(QUICK, **changes), device=device)
        assert "\n" not in str(e.value)
    with pytest.raises(TuneError, match="no norm or bias x of shape"):
        evaluate_kl(folder, planes, held, {"x": torch.zeros(3)})
    with pytest.raises(TuneError, match="transformers cannot load it"):
        tune(folder.parent, planes, windows, held, QUICK)


def test_what_is_not_tuned_is_told(text: tuple[Any, Any], tmp_path: Path) -> None:
    model = make_model("Mixtral", tmp_path, num_local_experts=4, tie_word_embeddings=True)
    planes = planes_of(model)
    experts = {n: p for n, p in model.named_parameters() if p.ndim == 3}
    odd = Planes(np.zeros((8, 32), np.int8), np.zeros((8, 1), np.uint8))
    got = tune(tmp_path, {**planes, **dict.fromkeys(experts, odd), "lm_head.weight": odd}, text[0], text[0], QUICK)
    assert len(got.notes) == len(experts) + 1 and all("not tuned" in n for n in got.notes)
    assert "lm_head.weight: not tuned, it is model.embed_tokens.weight too" in got.notes
    assert all(np.array_equal(got.planes[n].codes, odd.codes) for n in [*experts, "lm_head.weight"])
    assert min(m.held_out for m in got.history) < got.history[0].held_out


def test_a_model_of_states(text: tuple[Any, Any], tmp_path: Path) -> None:
    """Without attention: its head asks for other things than those of other families."""
    model = make_model("Mamba", tmp_path, state_size=4)
    planes = {n: p for n, p in planes_of(model).items() if n.endswith(("in_proj.weight", "out_proj.weight"))}
    got = tune(tmp_path, planes, text[0], text[0], QUICK)
    assert len(got.planes) == 4 and not got.notes
    assert min(m.held_out for m in got.history) < got.history[0].held_out


def test_an_embedding_that_multiplies_is_left(models: Any, text: tuple[Any, Any]) -> None:
    folder, _, planes = models["Gemma2"]
    odd = Planes(np.zeros((VOCABULARY, 64), np.int8), np.zeros((VOCABULARY, 2), np.uint8))
    got = tune(folder, {**planes, "model.embed_tokens.weight": odd}, text[0], text[0], QUICK)
    assert [n.partition(":")[0] for n in got.notes] == ["model.embed_tokens.weight"]
    assert np.array_equal(got.planes["model.embed_tokens.weight"].levels, odd.levels)
    assert min(m.held_out for m in got.history) < got.history[0].held_out
