"""Across ranks: under DDP's mean of gradients, every loss is that of one process holding the whole batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from vito_kernels import MoCoLoss, clip_loss, info_nce, multi_view_info_nce, ntxent, reference, siglip_loss, supcon_loss
from vito_kernels.adapters.lightly import DCLLoss, NTXentLoss, SupConLoss
from vito_kernels.adapters.open_clip import ClipLoss, DistillClipLoss, SigLipLoss
from vito_kernels.distributed import (
    gather_keys,
    global_clip_loss,
    global_info_nce,
    global_multi_view_info_nce,
    global_ntxent,
    global_siglip_loss,
    global_supcon_loss,
)

WIDTH, FEATURES = 12, 24
SIZES = {2: [7, 7], 3: [5, 9, 1]}  # three ranks hold batches of different sizes


class Towers(nn.Module):
    """Two encoders and a learned scale."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, WIDTH), nn.Linear(FEATURES, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, a, b):
        return normalize(self.first(a), dim=1), normalize(self.second(b), dim=1), self.log_scale.exp()


def as_views(name, x, y, scale, video):
    """(queries, keys, options): three views made of the embeddings."""
    queries, keys = (torch.stack([z, z.roll(1, 1), z.roll(2, 1)]) for z in (x, y))
    options = {"temperature": 1 / scale, "q_group": video, "k_group": video}
    return queries, keys.detach() if name.endswith("locked") else keys, options


def make(total):
    torch.manual_seed(total)
    model = Towers().double()
    a, b = torch.randn(2, total, FEATURES, dtype=torch.float64)
    return model, a, b, torch.randint(0, 4, (total,))


def whole(name, x, y, scale, video):
    """The loss of one process with the whole batch."""
    if name.startswith("info_nce locked"):
        return info_nce(x, y.detach(), temperature=1 / scale, q_group=video, k_group=video)
    if name == "info_nce ring":
        return info_nce(x, y, temperature=1 / scale, q_group=video, k_group=video)
    if name == "info_nce":
        return info_nce(x, y, temperature=1 / scale)
    if name.startswith("views"):
        queries, keys, options = as_views(name, x, y, scale, video)
        return multi_view_info_nce(queries, keys, **options)
    if name.startswith("siglip"):
        return siglip_loss(x, y, scale, -scale / 2)
    if name == "supcon":
        return supcon_loss(x + y, video, temperature=1 / scale)
    if name == "ntxent":
        return ntxent(x, y, 1 / scale)
    if name.startswith("lightly"):
        return from_lightly(name, x, y, video, False)
    return clip_loss(x, y, scale)


LIGHTLY = ["lightly", "lightly negative", "lightly dcl", "lightly weights", "lightly labels", "lightly supcon"]
SIGLIP = {"siglip of open_clip": None, "siglip of open_clip, gathered": "gather"}


def from_lightly(name, x, y, video, across):
    """The loss of all rows, or of a rank's."""
    if name in ("lightly", "lightly negative"):
        return NTXentLoss(-0.5 if name.endswith("negative") else 0.2, gather_distributed=across)(x, y)
    if name in ("lightly dcl", "lightly weights"):
        weights = None if name.endswith("dcl") else lambda a, b: (a - b).square().sum(1)
        return DCLLoss(0.2, weights, across)(x, y)
    return SupConLoss(0.2, across)(x, y, video if name.endswith("labels") else None)


def share(name, x, y, scale, video, sizes):
    """What one rank computes from its own rows."""
    equal = len(set(sizes)) == 1
    if name == "info_nce locked":
        pending = gather_keys(y.detach(), video, sizes=sizes if equal else None)
        return global_info_nce(x, pending, temperature=1 / scale, q_group=video)
    if name == "info_nce locked ring":
        return global_info_nce(x, y.detach(), temperature=1 / scale, q_group=video, k_group=video, exchange="ring")
    if name == "info_nce ring":
        groups = {"q_group": video, "k_group": video}
        return global_info_nce(x, y, temperature=1 / scale, **groups, sizes=sizes, exchange="ring")
    if name == "info_nce":
        return global_info_nce(x, y, temperature=1 / scale)
    if name.startswith("views"):
        queries, keys, options = as_views(name, x, y, scale, video)
        return global_multi_view_info_nce(queries, keys, **options, sizes=sizes)
    if name in ("siglip", "siglip ring"):
        return global_siglip_loss(x, y, scale, -scale / 2, exchange="ring" if name.endswith("ring") else "gather")
    if name == "supcon":
        return global_supcon_loss(x + y, video, temperature=1 / scale, sizes=sizes)
    if name == "clip ring":
        return global_clip_loss(x, y, scale, exchange="ring")
    if name == "ntxent":
        return global_ntxent(x, y, 1 / scale, sizes=sizes)
    if name == "clip":
        return global_clip_loss(x, y, scale)
    if name.startswith("lightly"):
        return from_lightly(name, x, y, video, True)
    if name in SIGLIP:
        return SigLipLoss(rank=dist.get_rank(), world_size=len(sizes), dist_impl=SIGLIP[name])(x, y, scale, -scale / 2)
    return ClipLoss(local_loss=name.endswith("local"), rank=dist.get_rank(), world_size=len(sizes))(x, y, scale)


def compare(rank, sizes):
    names = ["info_nce locked", "info_nce", "clip", "ntxent", "info_nce locked ring", "info_nce ring", "clip ring"]
    names += ["views", "views locked", "siglip", "siglip ring", "supcon"]
    if len(set(sizes)) == 1:  # as in the libraries they stand for, adapters want equal batches
        names += ["open_clip", "open_clip local", *LIGHTLY, *SIGLIP]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for name in names:
        model, a, b, video = make(sum(sizes))
        expected = whole(name, *model(a, b), video)
        expected.backward()
        truth = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        loss = share(name, *parallel(a[rows], b[rows]), video[rows], sizes)
        loss.backward()
        value = loss.detach().clone()
        if name != "open_clip":
            dist.all_reduce(value)
            value /= len(sizes)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        for key, grad in truth.items():
            found = dict(model.named_parameters())[key].grad
            torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-15, msg=lambda m, n=name, k=key: f"{n} {k}: {m}")
    for wrong in ([99] * len(sizes), [*sizes, 1], [float(size) for size in sizes], 7):
        with pytest.raises(ValueError, match=r"sizes must hold.*, got [\[7]"):
            gather_keys(b[rows], sizes=wrong)
    pending = gather_keys(b[rows], video[rows])
    with pytest.raises(ValueError, match=r"exchange='ring'.*give it k"):
        global_info_nce(b[rows], pending, exchange="ring")
    with pytest.raises(ValueError, match="k_group belongs to gather_keys"):
        global_info_nce(b[rows], pending, q_group=video[rows], k_group=video[rows])
    pending.wait()


def adapters(rank, sizes):
    """MoCo's and lightly's queues take the keys of all ranks, and ``match_open_clip_scaling`` gives its gradients."""
    rows, ranks = sizes[0], len(sizes)
    x, y = (normalize(z, dim=1) for z in torch.randn(2, sum(sizes), WIDTH, generator=torch.Generator().manual_seed(1)))
    own = slice(rank * rows, (rank + 1) * rows)
    torch.manual_seed(0)
    moco, banked = MoCoLoss(WIDTH, 20, gather_distributed=True), NTXentLoss(0.2, (20, WIDTH), gather_distributed=True)
    q = x[own].clone().requires_grad_()
    for loss, queue in ((moco, lambda: moco.queue), (banked, lambda: banked.bank)):
        before = queue().clone()
        loss(q, y[own])
        torch.testing.assert_close(queue(), torch.cat([y, before[sum(sizes) :]]))
        loss(q, y[own])  # past the end: MoCo's goes round, lightly's bank drops the rest
    assert torch.equal(moco.queue[sum(sizes) :], y[: 20 - sum(sizes)])
    assert torch.equal(moco.queue[: 2 * sum(sizes) - 20], y[20 - sum(sizes) :])

    scale = torch.tensor(9.0, requires_grad=True)
    mine = [z[own].clone().requires_grad_() for z in (x, y)]
    whole = [torch.cat([z[: own.start], part, z[own.stop :]]) for z, part in zip((x, y), mine, strict=True)]
    expected = reference.clip_loss(*whole, scale)  # as open_clip's default flags: others' features have no gradient
    truth = torch.autograd.grad(expected, (*mine, scale))
    for match in (True, False):
        loss = ClipLoss(rank=rank, world_size=ranks, match_open_clip_scaling=match)(*mine, scale)
        torch.testing.assert_close(loss, expected)
        *found, g_scale = torch.autograd.grad(loss, (*mine, scale))
        torch.testing.assert_close(found, [g * (1 if match else ranks) for g in truth[:2]], rtol=1e-4, atol=1e-6)
        dist.all_reduce(g_scale)
        torch.testing.assert_close(g_scale / ranks, truth[2], rtol=1e-4, atol=1e-6)

    teacher = x.flip(1), y.flip(1)
    truth = torch.autograd.grad(DistillClipLoss()(*whole, scale, *teacher, 7.0)[1], mine)
    for match in (True, False):
        loss = DistillClipLoss(rank=rank, world_size=ranks, match_open_clip_scaling=match)
        found = torch.autograd.grad(loss(*mine, scale, *(z[own] for z in teacher), 7.0)[1], mine)
        torch.testing.assert_close(found, tuple(g * (1 if match else ranks) for g in truth), rtol=1e-4, atol=1e-6)


def test_queues_and_gradients_of_the_adapters_over_ranks():
    spawn(adapters, 2, SIZES[2])


class Widest(TorchDispatchMode):
    """The most rows that any matrix of ``WIDTH`` columns has, while this mode is on."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == WIDTH:
                self.rows = max(self.rows, x.shape[-2])
        return out


def with_gradients(name, exchange, x, y, video, **options):
    """(widest matrix, loss, gradients) of a rank."""
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(30.0).to(x).requires_grad_()]
    with Widest() as seen:
        if name == "clip":
            loss = global_clip_loss(*leaves, exchange=exchange, **options)
        else:
            keys = leaves[1] if name == "info_nce" else y
            groups = {"q_group": video, "k_group": video}
            loss = global_info_nce(leaves[0], keys, temperature=1 / leaves[2], **groups, exchange=exchange, **options)
        loss.backward()
    return seen.rows, [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def refuse_twice(rank):
    """Of each gradient with respect to either side, alone and through ``backward``."""
    losses = [partial(global_ntxent, temperature=0.5)]
    for exchange in ("gather", "ring"):
        losses += [partial(global_info_nce, exchange=exchange), partial(global_clip_loss, scale=1.0, exchange=exchange)]
    for loss in losses:
        for side in (0, 1):
            sides = [torch.randn(3, WIDTH, requires_grad=True) for _ in range(2)]
            value = loss(*sides)
            (first,) = torch.autograd.grad(value, sides[side], create_graph=True)
            total = value + first.square().sum()
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(total, sides[side], retain_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative"):
                total.backward()


def test_double_backward_is_refused_across_ranks():
    spawn(refuse_twice, 2)


def ring_within_a_group(rank, sizes):
    members = [0, 2]
    group = dist.new_group(members)
    sizes = [sizes[member] for member in members]
    if rank in members:
        torch.manual_seed(rank)
        x, y = torch.randn(2, sizes[members.index(rank)], WIDTH, dtype=torch.float64)
        video = torch.full((len(x),), 5)  # of one video everywhere: queries that see no key, in part of the blocks
        video[::2] = torch.arange(len(video[::2]))
        for name in ("info_nce", "info_nce locked", "clip"):
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):  # logits of hundreds
                sides = x.to(dtype), y.to(dtype), video
                gathered, expected = with_gradients(name, "gather", *sides, group=group)
                visiting, found = with_gradients(name, "ring", *sides, group=group)
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
                assert gathered >= sum(sizes)  # padded rows of all ranks
                assert visiting == max(sizes)


def test_the_ring_stays_in_its_group_and_never_holds_all_keys():
    spawn(ring_within_a_group, 3, SIZES[3])


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_those_of_one_process_with_the_whole_batch(ranks):
    spawn(compare, ranks, SIZES[ranks])


@pytest.mark.parametrize("loss", [global_info_nce, lambda x, y, **options: global_clip_loss(x, y, 1.0, **options)])
def test_an_unknown_exchange_is_named(loss):
    with pytest.raises(ValueError, match="exchange must be one of gather, ring, got 'star'"):
        loss(torch.ones(2, 16), torch.ones(2, 16), exchange="star")


def test_keys_with_gradient_are_not_gathered_as_locked_ones():
    with pytest.raises(ValueError, match=r"k requires grad.*k\.detach"):
        gather_keys(torch.ones(2, 16, requires_grad=True))
