"""Which numbers, shapes and dtypes the losses take, and what they say of the rest."""

from __future__ import annotations

import itertools
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from contrastive_cases import embeddings
from torch._dynamo.testing import CompileCounterWithBackend

import vito_kernels as vk
from vito_kernels._core import autograd as _ops
from vito_kernels.adapters.lightly import NTXentLoss as LightlyAdapter
from vito_kernels.adapters.open_clip import ClipLoss as ClipAdapter
from vito_kernels.contrastive import cpu, small
from vito_kernels.distributed import collectives

OPTIONS = [{}, {"label_smoothing": 0.1}, {"hard_negatives": 0.5}, {"debias": 0.1, "hard_negatives": 0.5}]


def pair(dtype=torch.float32):
    return [embeddings(6, 16, dtype, "cpu", i, True) for i in range(2)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_temperature_of_one_element_has_any_shape(shape, options):
    q, k = pair()
    expected = vk.info_nce(q, k, temperature=0.1, reduction="none", **options)
    for dtype in (torch.float32, torch.float64):
        temperature = torch.full(shape, 0.1, dtype=dtype, requires_grad=True)
        found = vk.info_nce(q, k, temperature=temperature, reduction="none", **options)
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found.sum(), temperature)[0].shape == shape


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_numbers_of_numpy_are_numbers(options, kind):
    q, k = (x.requires_grad_() for x in pair(torch.float64))
    numbers = {name: kind(value) for name, value in ({"temperature": 0.3} | options).items()}
    plain = {name: float(value) for name, value in numbers.items()}
    torch.testing.assert_close(vk.info_nce(q, k, **numbers), vk.info_nce(q, k, **plain))
    torch.testing.assert_close(vk.clip_loss(q, k, kind(8)), vk.clip_loss(q, k, 8))


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_numbers_may_be_symbols_of_a_compiler(dynamic):
    q, k = pair()

    def losses(scale, share):
        return vk.clip_loss(q, k, scale) + vk.info_nce(q, k, temperature=1 / scale, label_smoothing=share)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for scale, share in [(9.0, 0.1), (7.5, 0.2), (5.25, 0.3)]:
        torch.testing.assert_close(compiled(scale, share), losses(scale, share))


@pytest.mark.parametrize("options", [{}, {"hard_negatives": 0.5}, {"debias": 0.03}], ids=str)
def test_a_schedule_of_temperatures_is_compiled_once(options):
    """After its first value, which is a constant."""
    q, k = pair()
    counter = CompileCounterWithBackend("aot_eager")

    def losses(t):
        found = vk.info_nce(q, k, temperature=t, **options) + vk.clip_loss(q, k, 1 / t) + vk.ntxent(q, k, t)
        return found + vk.moco_loss(q, k, k, temperature=t) + vk.similarity_lse(q, k, t).sum()

    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    for temperature in (0.5, 0.4, 0.3, 0.2, 0.1):
        torch.testing.assert_close(compiled(temperature), losses(temperature))
    assert counter.frame_count <= 2


PAIR_LOSSES = {
    "lse": lambda x, y: vk.similarity_lse(x, y, 9.0).sum(),
    "info_nce": lambda x, y: vk.info_nce(x, y),
    "clip": lambda x, y: vk.clip_loss(x, y, 9.0),
    "moco": lambda x, y: vk.moco_loss(x, y.detach(), y.detach().float(), temperature=0.2) + y.float().sum(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow", [(True, False), (False, True)], ids=["first", "second"])
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_autocast_mixes_dtypes(loss, narrow, dtype):
    """As float32 embeddings of the same values: the side of 16 bits rounds its gradient once."""
    wide = [x.to(dtype).float().requires_grad_() for x in pair()]
    mixed = [x.to(dtype) if narrow_one else x for x, narrow_one in zip(wide, narrow, strict=True)]
    mixed = [x.detach().requires_grad_() for x in mixed]
    with torch.autocast("cpu", dtype):
        expected, found = (PAIR_LOSSES[loss](*sides) for sides in (wide, mixed))
    assert torch.equal(found, expected)
    grads = torch.autograd.grad(found, mixed)
    truth = [g.to(x.dtype) for g, x in zip(torch.autograd.grad(expected, wide), mixed, strict=True)]
    torch.testing.assert_close(list(grads), truth, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_autocast_takes_every_mix_that_a_matmul_takes(loss, dtype):
    """On a grid that all of them hold, with the value and gradients of float32."""
    wide = [((64 * x).round() / 64).requires_grad_() for x in pair()]
    with torch.autocast("cpu", dtype):
        expected = PAIR_LOSSES[loss](*wide)
    truth = torch.autograd.grad(expected, wide)
    for kinds in itertools.permutations((torch.float16, torch.bfloat16, torch.float32), 2):
        mixed = [x.detach().to(kind).requires_grad_() for x, kind in zip(wide, kinds, strict=True)]
        with torch.autocast("cpu", dtype):
            found = PAIR_LOSSES[loss](*mixed)
        assert torch.equal(found, expected)
        grads = torch.autograd.grad(found, mixed)
        rounded = [g.to(kind) for g, kind in zip(truth, kinds, strict=True)]
        torch.testing.assert_close(list(grads), rounded, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ntxent_takes_every_mix_under_autocast(dtype):
    """And 16 bits that are not autocast's, which ``torch.stack`` refuses."""
    x, y = pair()
    with torch.autocast("cpu", dtype):
        expected = vk.ntxent(x, y, 0.2)
        for kinds in itertools.product((torch.float16, torch.bfloat16, torch.float32), repeat=2):
            found = vk.ntxent(x.to(kinds[0]), y.to(kinds[1]), 0.2)
            torch.testing.assert_close(found, expected, rtol=4e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("library", "adapter", "arguments"),
    [
        ("open_clip.loss.ClipLoss", ClipAdapter, {}),
        ("lightly.loss.NTXentLoss", LightlyAdapter, {}),
        ("lightly.loss.NTXentLoss", LightlyAdapter, {"memory_bank_size": (20, 16)}),
    ],
    ids=["open_clip", "lightly", "lightly's bank"],
)
def test_autocast_mixes_dtypes_as_in_the_libraries(library, adapter, arguments, dtype):
    module, _, name = library.rpartition(".")
    peer = getattr(pytest.importorskip(module), name)
    x, y = pair()
    scale = (9.0,) if adapter is ClipAdapter else ()
    for sides in ((x.to(dtype), y), (x, y.to(dtype))):
        losses = []
        for make in (adapter, peer):
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype):
                losses.append(make(**arguments)(*sides, *scale).float())
        torch.testing.assert_close(*losses, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_adapters_take_what_turns_their_option_off():
    x, y = pair()
    assert torch.equal(LightlyAdapter(0.3, (0, 16))(x, y), vk.ntxent(x, y, 0.3))
    assert torch.equal(ClipAdapter(rank=1, world_size=1)(x, y, 9.0), vk.clip_loss(x, y, 9.0))


NO_SIZES = [16.5, True, None, "8", float("nan"), float("inf"), (8, 16), torch.ones(2)]
SIZES = {
    "width": vk.MoCoLoss,
    "queue_size": lambda queue_size: vk.MoCoLoss(16, queue_size),
    "channels": vk.AttentionPool,
    "hidden": lambda hidden: vk.AttentionPool(16, [] if hidden is None else hidden),
    "rank": lambda rank: ClipAdapter(rank=rank),
    "world_size": lambda world_size: ClipAdapter(world_size=world_size),
}


@pytest.mark.parametrize("size", NO_SIZES, ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_what_is_no_size_is_named(name, size):
    with pytest.raises(TypeError, match=f"{name} must be a whole number, got"):
        SIZES[name](size)


@pytest.mark.parametrize("size", NO_SIZES[:6], ids=str)
def test_what_is_no_memory_bank_is_named(size):
    for bank in (size, (size, 16), (8, size)):
        with pytest.raises(ValueError, match="Illegal memory bank size"):
            LightlyAdapter(0.3, bank)


@pytest.mark.parametrize("value", ["False", None, 0.5, torch.ones(2)], ids=str)
def test_what_is_no_flag_is_named(value):
    for name in ("local_loss", "gather_with_grad", "cache_labels", "use_horovod"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            ClipAdapter(**{name: value})
    with pytest.raises(TypeError, match="gather_distributed must be True or False, got"):
        LightlyAdapter(0.3, gather_distributed=value)


def test_sizes_of_numpy_are_sizes():
    assert vk.MoCoLoss(np.int64(16), np.int32(8)).queue.shape == (8, 16)
    assert LightlyAdapter(0.3, (np.int64(8), 16)).bank.shape == (8, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_temperature_is_inverted_in_float64(dtype):
    q, k = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor(0.07, dtype=dtype)
    expected = vk.reference.info_nce(q.double(), k.double(), temperature=temperature.double())
    torch.testing.assert_close(vk.info_nce(q, k, temperature=temperature).double(), expected, rtol=2e-6, atol=0)
    assert vk.info_nce(q / 1e3, k / 1e3, temperature=torch.tensor(1e-5, dtype=torch.float16)).isfinite()


def test_a_temperature_that_nobody_looks_at_must_be_positive():
    """In a traced graph a negative one makes the scale NaN; on a CPU the op, which looks at it, says so."""
    wrong = torch.tensor(-0.5)
    traced = torch.compile(lambda t: vk.info_nce(X, X, temperature=t), backend="aot_eager")
    with pytest.raises(ValueError, match=r"temperature must be positive.*got nan"):
        traced(wrong)
    with pytest.raises(ValueError, match=r"temperature must be positive.*got nan"):
        torch.func.grad(lambda t: vk.info_nce(X, X, temperature=t))(wrong)


@pytest.mark.parametrize(
    "call",
    [
        vk.info_nce,
        lambda x, y: vk.info_nce(x, y, hard_negatives=0.5, debias=0.1),
        lambda x, y: vk.similarity_lse(x, y, 10.0),
        lambda x, y: vk.clip_loss(x, y, 10.0),
        lambda x, y: vk.ntxent(x, y, 0.5),
        lambda x, y: vk.moco_loss(x, y.detach(), y.detach()),
        lambda x, y: vk.supcon_loss(x, torch.zeros(4, dtype=torch.long, device="meta")),
        lambda x, y: vk.normalize(x),
        lambda x, y: vk.attention_pool(x[None], y[None, :, 0])[0],
    ],
)
def test_meta_tensors_have_shapes(call):
    x, y = (torch.empty(4, 16, device="meta", requires_grad=True) for _ in range(2))
    out = call(x, y)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.is_meta
    assert grad.shape == x.shape


X = torch.ones(4, 16)
WRONG = [
    (ValueError, "width and queue_size must be positive, got 0 and 8", lambda: vk.MoCoLoss(0, 8)),
    (ValueError, "width and queue_size must be positive, got 16 and -1", lambda: vk.MoCoLoss(16, -1)),
    (TypeError, "width must be a whole number, got 16.5", lambda: vk.MoCoLoss(16.5, 8)),
    (ValueError, r"scale must fit torch.float32.*got 1e\+39", lambda: vk.clip_loss(X, X, 1e39)),
    (ValueError, r"scale must fit torch.float32.*got -1e\+300", lambda: vk.similarity_lse(X, X, -1e300)),
    (ValueError, "temperature must be at least 2.94e-39, got 1e-45", lambda: vk.info_nce(X, X, temperature=1e-45)),
    (ValueError, "temperature must be at least.*got 1e-310", lambda: vk.MoCoLoss(16, 8, temperature=1e-310)),
    (ValueError, "temperature must be at least.*got 1.4", lambda: vk.ntxent(X, X, torch.tensor(1e-45))),
    (TypeError, "temperature must be a number.*bool", lambda: vk.info_nce(X, X, temperature=True)),
    (TypeError, "label_smoothing must be a number, got bool", lambda: vk.info_nce(X, X, label_smoothing=np.True_)),
    (TypeError, "scale must be a number.*complex", lambda: vk.clip_loss(X, X, 1j)),
    (ValueError, r"memory bank size \(-1, 16\)", lambda: LightlyAdapter(0.3, (-1, 16))),
    (ValueError, r"memory bank size \(8, 0\)", lambda: LightlyAdapter(0.3, (8, 0))),
    (ValueError, r"memory bank size \(0, 16, 2\)", lambda: LightlyAdapter(0.3, (0, 16, 2))),
    (ValueError, "rank must lie in.*got 2 of 2", lambda: ClipAdapter(rank=2, world_size=2)),
    (ValueError, "rank must lie in.*got 0 of 0", lambda: ClipAdapter(world_size=0)),
    (TypeError, "same dtype, got torch.float32 and torch.float64", lambda: under_autocast(X, X.double())),
    (TypeError, "same dtype, got torch.float64 and torch.float16", lambda: under_autocast(X.double(), X.half())),
    (TypeError, "same dtype, got torch.float32 and torch.bfloat16", lambda: vk.info_nce(X, X.bfloat16())),
]


def under_autocast(x, y):
    with torch.autocast("cpu", torch.bfloat16):
        return vk.clip_loss(x, y, 1.0)


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_input_is_named(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


def test_a_positive_that_is_no_key_makes_the_loss_nan(monkeypatch):
    """Where positives are not checked, as on a GPU, for which the host would have to wait."""
    monkeypatch.setattr(cpu, "check_positive_range", lambda *given: None)
    monkeypatch.setattr(small, "MOST_LOGITS", 0)
    q, k = pair()
    positive = torch.arange(6)
    positive[3] = 99
    losses = vk.info_nce(q, k, positive=positive, reduction="none")
    assert losses.isnan().tolist() == [i == 3 for i in range(6)]


def test_an_op_runs_on_the_device_of_its_tensors(monkeypatch):
    """Tiles are chosen for it, whichever GPU is current."""
    entered = []
    monkeypatch.setattr(_ops, "on_device", lambda tensor: entered.append(tensor.shape) or nullcontext())
    monkeypatch.setattr(small, "MOST_LOGITS", 0)
    q, k = pair()
    vk.info_nce(q.requires_grad_(), k, temperature=0.1).backward()
    assert {q.shape} <= set(entered)
    assert len(entered) == 2  # the loss and its gradient


@pytest.mark.parametrize(("chosen", "precision"), [("tf32", "high"), ("ieee", "highest")])
def test_float32_precision_by_either_of_torchs_ways(chosen, precision):
    """In a process of its own: PyTorch has no way back from the later to the earlier."""
    code = (
        "import torch; from vito_kernels.contrastive import tile_configs\n"
        f"torch.backends.cuda.matmul.fp32_precision = {chosen!r}\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'; print(tile_configs.matmul_precision())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == precision


def test_sixteen_bits_are_rounded_once_over_ranks(monkeypatch):
    summed = []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: summed.append(x.dtype))
    for dtype, wide in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert collectives._Scatter.apply(torch.ones(4, 2, dtype=dtype), [2, 2], None).dtype == dtype
        assert summed.pop() == wide
