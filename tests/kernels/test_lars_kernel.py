"""LARS's kernels against the formula, one tensor at a time: at most twice the error of torch in the same precision."""

import pytest
import torch

from vito_kernels import FusedLars
from vito_kernels._core.lazy_triton import record_launches
from vito_kernels.lars import CHUNK, norms_op, update_op

ADAPTED = [(3, 5), (8, 3, 3, 3), (1, 1), (16, 12, 1, 1), (4, CHUNK // 4), (7, 2411), (3, CHUNK - 5)]
PLAIN = [(64,), (), (0,), (CHUNK + 3,)]
KEEP, DECAY, TRUST, RATE = 0.9, 1e-2, 1e-3, 0.3


def draw(device, seed=0, shapes=(*ADAPTED, *PLAIN)):
    """Weights, gradients and momentum; filters are channels_last."""
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(shape, generator=generator).to(device) for shape in shapes] for _ in range(3)]
    last = torch.channels_last
    return [[t.contiguous(memory_format=last) if t.dim() == 4 else t for t in tensors] for tensors in lists]


def formula(weights, gradients, momentum, lr, adapted=len(ADAPTED), decay=DECAY):
    for i, (w, g, m) in enumerate(zip(weights, gradients, momentum, strict=True)):
        if i < adapted:
            g = g + decay * w
            if w.norm() > 0 and g.norm() > 0:
                g = g * (TRUST * w.norm() / g.norm())
        m.mul_(KEEP).add_(g)
        w.sub_(lr * m)


def tensors_of(lists):
    return [t for tensors in lists for t in tensors]


def assert_equal(ours, others):
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(ours), tensors_of(others), strict=True))


def cloned(lists, dtype=torch.float32):
    return [[t.clone().to(dtype) for t in tensors] for tensors in lists]


def take(step, *given):
    done = step(*given)  # called also in a rehearsal, which leaves assertions out
    assert done


def fused(adapted=len(ADAPTED), decay=DECAY):
    return FusedLars(adapted, KEEP, decay, TRUST)


def assert_as_exact_as_torch(ours, torchs, exact):
    for a, b, c in zip(tensors_of(ours), tensors_of(torchs), tensors_of(exact), strict=True):
        error, allowed = (a.double() - c).norm(), 2 * (b.double() - c).norm()
        assert error <= allowed + 4 * torch.finfo(torch.float32).eps * c.norm(), a.shape


@pytest.mark.parametrize("decay", [DECAY, 0.0])
@pytest.mark.parametrize("adapted", [len(ADAPTED), 0, len(ADAPTED + PLAIN)], ids=["some", "none", "all"])
def test_exact_over_steps(adapted, decay, device):
    """New gradients lie elsewhere at each step."""
    ours = draw(device)
    torchs, exact = cloned(ours), cloned(ours, torch.float64)
    step = fused(adapted, decay).step
    for k in range(3):
        given = draw(device, seed=k + 1)[1]
        for lists in (torchs, exact):
            lists[1] = [g.to(lists[0][0].dtype) for g in given]
            formula(*lists, RATE * k, adapted, decay)
        ours[1] = given
        take(step, *ours, RATE * k, torch.tensor(True, device=device) if k % 2 else None)
    assert_as_exact_as_torch(ours[::2], torchs[::2], exact[::2])


def test_zero_weights_and_zero_gradients_have_trust_ratio_one(device):
    one, zero = torch.ones(2, 2, device=device), torch.zeros(2, 2, device=device)
    weights, gradients, momentum = [zero.clone(), one.clone()], [one, zero], [zero.clone(), zero.clone()]
    take(fused(2, decay=0.0).step, weights, gradients, momentum, 0.5, None)
    assert torch.equal(weights[0], -0.5 * one)
    assert torch.equal(weights[1], one)


def test_a_skipped_step_changes_nothing(device):
    lists = draw(device)
    lists[1] = [torch.full_like(g, torch.nan) for g in lists[1]]
    before = cloned(lists)
    take(fused().step, *lists, RATE, torch.tensor(False, device=device))
    assert_equal(lists[::2], before[::2])


def test_two_launches_for_all_tensors(device):
    names = []
    with record_launches(lambda kernel, *_, **__: names.append(kernel.__name__)):
        take(fused().step, *draw(device), RATE, None)
    assert names == ["lars_norms_kernel", "lars_update_kernel"]


def test_a_graph_that_kept_a_weight_notices_the_update(device):
    weights, gradients, momentum = draw(device)
    weight = weights[0].requires_grad_()
    loss = weight.square().sum()
    weights[0] = weight.detach()
    take(fused().step, weights, gradients, momentum, RATE, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_deterministic_and_the_same_through_the_dispatcher(device):
    lists = draw(device)
    again, dispatched = cloned(lists), cloned(lists)
    take(fused().step, *lists, RATE, None)
    take(fused().step, *again, RATE, None)
    count = len(ADAPTED)
    partials = norms_op(dispatched[0][:count], dispatched[1][:count], None, DECAY)
    update_op(*dispatched, partials, None, count, RATE, KEEP, DECAY, TRUST)
    for other in (again, dispatched):
        assert_equal(lists, other)


def test_addresses_need_not_be_aligned(device):
    ours = [[torch.empty(t.numel() + 1, device=device)[1:].copy_(t.flatten()) for t in x] for x in draw(device)]
    torchs, exact = cloned(ours), cloned(ours, torch.float64)
    assert any(t.data_ptr() % 16 for t in ours[1])
    take(fused().step, *ours, RATE, None)
    formula(*torchs, RATE)
    formula(*exact, RATE)
    assert_as_exact_as_torch(ours, torchs, exact)


def test_an_address_that_changes_is_noticed(device):
    """One of a weight, one of a gradient, one of momentum, each after a step with the others."""
    ours = draw(device)
    torchs, exact = cloned(ours), cloned(ours, torch.float64)
    step = fused().step
    for moved in (None, 0, 1, 2):
        if moved is not None:
            ours[moved][4] = ours[moved][4].clone()
        take(step, *ours, RATE, None)
        formula(*torchs, RATE)
        formula(*exact, RATE)
    assert_as_exact_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("case", ["dtype", "format", "part"])
def test_other_tensors_are_left_to_torch(case, device):
    lists, step = draw(device), fused().step
    take(step, *lists, RATE, None)
    filters = ADAPTED.index((8, 3, 3, 3))
    weight, gradient = lists[0][filters], lists[1][filters]
    lists[1][filters] = {
        "dtype": gradient.bfloat16(),
        "format": gradient.contiguous(),
        "part": torch.zeros(8, 3, 3, 6, device=device)[..., ::2],
    }[case]
    before = weight.clone()
    assert not step(*lists, RATE, None)
    assert torch.equal(weight, before)
    lists[1][filters] = gradient
    take(step, *lists, RATE, None)


def test_float64_is_left_to_torch(device):
    assert not fused().step(*cloned(draw(device), torch.float64), RATE, None)


if torch.cuda.is_available():

    def test_cuda_graph():
        """It replays with the addresses of its capture, whatever came between. New ones are not captured."""
        captured, eager = draw("cuda"), draw("cuda")
        step, plain = fused().step, fused().step
        take(step, *captured, RATE, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            take(step, *captured, RATE, None)
            assert not step(captured[0], [g.clone() for g in captured[1]], captured[2], RATE, None)
        take(step, *draw("cuda", seed=1), RATE, None)
        graph.replay()
        for _ in range(2):
            take(plain, *eager, RATE, None)
        assert_equal(captured, eager)
