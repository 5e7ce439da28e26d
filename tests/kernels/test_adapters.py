"""The drop-in losses: against the libraries they replace, where those are installed, and against their formulas."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from contrastive_cases import embeddings, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, normalize
from torch.utils._python_dispatch import TorchDispatchMode

import vito_kernels as vk
from vito_kernels import reference
from vito_kernels.adapters import lightly, open_clip
from vito_kernels.contrastive import small

B, D = 24, 32


def pair(unit=True):
    return [embeddings(B, D, torch.float32, "cpu", i, unit) for i in range(2)]


def assert_same(ours, theirs, inputs):
    """Values and gradients."""
    for found, truth in zip(with_gradients(ours, inputs), with_gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


# ---- open_clip


def test_open_clip():
    peer = pytest.importorskip("open_clip.loss")
    x, y, scale, bias = inputs = [*pair(), torch.tensor(14.0), torch.tensor(-3.0)]
    words, logits = torch.arange(4 * B).reshape(B, 4) % 5, torch.randn(B, 4, 5)
    calls = [  # a class, its options, and the arguments of a call: those that get gradients come first
        ("ClipLoss", (), (x, y, scale), ()),
        ("ClipLoss", (), (x, y, scale), (bias,)),
        ("SigLipLoss", (), inputs, ()),
        ("DistillClipLoss", (), (x, y, scale), (y, x, 7.0)),
        ("CoCaLoss", (2.0, 0.5, 3), (x, y), (logits, words, scale)),
        ("CoCaLoss", (2.0, 0.0), (x, y), (logits, words, scale)),
    ]
    for name, options, leaves, others in calls:
        both = [getattr(module, name)(*options) for module in (open_clip, peer)]
        found, truth = (
            with_gradients(lambda *t, f=f, more=others: torch.stack([sum(t).sum() * 0, *_listed(f(*t, *more))]), leaves)
            for f in both
        )
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
        assert both[0](*leaves, *others, output_dict=True).keys() == both[1](*leaves, *others, output_dict=True).keys()


def _listed(losses):
    return losses if isinstance(losses, tuple) else (losses,)


def test_siglip_of_open_clip_is_its_formula():
    x, y = pair()
    inputs = [x, y, torch.tensor(10.0), torch.tensor([-10.0])]  # FSDP makes a scalar parameter one of one element
    assert_same(open_clip.SigLipLoss(), reference.siglip_loss, inputs)
    torch.testing.assert_close(open_clip.SigLipLoss()(x, y, 10.0), reference.siglip_loss(x, y, 10.0))
    assert open_clip.SigLipLoss()(*inputs, output_dict=True).keys() == {"contrastive_loss"}
    logits = open_clip.SigLipLoss().get_logits(x, y, 10.0, -10.0)
    signs = open_clip.SigLipLoss().get_ground_truth(x.device, x.dtype, B)
    expected = -torch.nn.functional.logsigmoid(signs * logits).sum() / B
    torch.testing.assert_close(open_clip.SigLipLoss()(x, y, 10.0, -10.0), expected)
    assert open_clip.SigLipLoss().get_ground_truth("cpu", torch.float32, 3, negative_only=True).sum() == -9
    for images, texts, negative_only in ((B, B, False), (B, B, True), (B, 9, False), (9, B, True), (9, B, False)):
        signs = torch.full((images, texts), -1.0)
        if not negative_only:
            signs.fill_diagonal_(1)
        assert_same(
            lambda x, y, t, b, only=negative_only: open_clip.SigLipLoss()._loss(x, y, t, b, negative_only=only),
            lambda x, y, t, b, signs=signs: -torch.nn.functional.logsigmoid(signs * (t * x @ y.T + b)).sum() / len(x),
            [x[:images], y[:texts], *inputs[2:]],
        )
    with pytest.raises(ValueError, match="dist_impl must be one of bidir, shift, reduce, gather, got 'ring'"):
        open_clip.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="rank must lie in"):
        open_clip.SigLipLoss(rank=2, world_size=2)


def test_distillation_and_captions_are_their_formulas():
    x, y = pair()
    contrastive, distilled = open_clip.DistillClipLoss()(x, y, 14.0, y, x, 7.0)
    torch.testing.assert_close(contrastive, reference.clip_loss(x, y, 14.0))
    student, teacher = 14 * x @ y.T, 7 * y @ x.T
    ways = (student, teacher), (student.T, teacher.T)
    expected = [-(t.softmax(1) * s.log_softmax(1)).sum(1).mean() for s, t in ways]
    torch.testing.assert_close(distilled, sum(expected) / 2)

    words, logits = torch.arange(4 * B).reshape(B, 4) % 5, torch.randn(B, 4, 5)
    contrastive, captions = open_clip.CoCaLoss(2.0, 0.5, pad_id=3)(x, y, logits, words, 14.0)
    torch.testing.assert_close(contrastive, reference.clip_loss(x, y, 14.0) / 2)
    torch.testing.assert_close(captions, 2 * cross_entropy(logits[words != 3], words[words != 3]))
    assert open_clip.CoCaLoss(2.0, 0.0)(x, y, logits, words, 14.0)[0] == 0


class Distilled(open_clip.ClipLoss):
    """As open_clip's own ``DistillClipLoss`` uses the class it inherits from."""

    def forward(self, x, y, scale, teacher_x, teacher_y, teacher_scale):
        student, teacher = self.get_logits(x, y, scale), self.get_logits(teacher_x, teacher_y, teacher_scale)
        labels = self.get_ground_truth(x.device, student[0].shape[0])
        contrastive = sum(cross_entropy(one, labels) for one in student) / 2
        distilled = [-(t.softmax(1) * s.log_softmax(1)).sum(1).mean() for s, t in zip(student, teacher, strict=True)]
        return contrastive, sum(distilled) / 2


def test_subclasses_of_the_open_clip_adapter_have_its_logits():
    x, y = pair()
    contrastive, distilled = Distilled()(x, y, 14.0, y, x, 7.0)
    torch.testing.assert_close(contrastive, open_clip.ClipLoss()(x, y, 14.0))
    assert distilled > 0
    local = open_clip.ClipLoss(local_loss=True, rank=1, world_size=2)
    assert local.get_ground_truth("cpu", 4).tolist() == [4, 5, 6, 7]


def test_open_clips_smaller_gradients_are_named_and_matched():
    with pytest.warns(UserWarning, match="match_open_clip_scaling"):
        open_clip.ClipLoss(world_size=2)
    assert open_clip.ClipLoss(world_size=2, match_open_clip_scaling=True).match_open_clip_scaling
    assert not open_clip.ClipLoss(match_open_clip_scaling=True).match_open_clip_scaling


# ---- lightly


def test_lightly():
    peer = pytest.importorskip("lightly.loss")
    inputs = pair(unit=False)
    fused, plain = with_gradients(lightly.NTXentLoss(0.3), inputs), with_gradients(peer.NTXentLoss(0.3), inputs)
    for found, truth in zip(fused, plain, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)
    losses = []
    for make in (lightly.NTXentLoss, peer.NTXentLoss):
        torch.manual_seed(0)
        loss = make(0.3, (2 * B + 5, D))
        values = []
        for i in range(6):
            with torch.set_grad_enabled(i != 2):  # which leaves the bank as it is
                values.append(loss(inputs[0].clone().requires_grad_(), inputs[1].roll(i, 0)).detach())
        losses.append(values)
    torch.testing.assert_close(*losses)


def test_the_bank_of_lightly_may_stay_on_the_cpu_and_compiles():
    """lightly's scripts do not move the loss; a GPU's tensors have shapes here."""
    with FakeTensorMode():
        x = torch.empty(8, D, device="cuda", requires_grad=True)
        assert lightly.NTXentLoss(0.3, (20, D))(x, x).device.type == "cuda"
    torch.manual_seed(0)
    eager = lightly.NTXentLoss(0.3, (20, D))
    loss = copy.deepcopy(eager)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for i in range(5):  # past the bank's end
        x, y = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close((loss if i % 2 else compiled)(x.requires_grad_(), y), eager(x, y))
        assert torch.equal(loss.bank, eager.bank)
        assert torch.equal(loss.bank_ptr, eager.bank_ptr)


def test_lightly_takes_a_bank_size_without_width_and_a_negative_temperature():
    x, y = pair(unit=False)
    with pytest.warns(UserWarning, match=r"pass \(20, dim\)"):
        loss = lightly.NTXentLoss(0.3, 20)
    assert loss(x, y).isfinite()
    assert loss.bank.shape == (20, D)
    z = normalize(torch.cat([x, y]), dim=1)
    logits = (z @ z.T / -0.5).fill_diagonal_(-torch.inf)
    expected = cross_entropy(logits, torch.arange(2 * B).roll(B))
    torch.testing.assert_close(lightly.NTXentLoss(-0.5)(x, y), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_bank_of_half_precision_is_never_nan(dtype):
    loss = lightly.NTXentLoss(0.1, (10, D)).to(dtype)
    x, y = (t.to(dtype) for t in pair(unit=False))
    x[0], y[1] = 0, 0
    x.requires_grad_()
    for _ in range(3):
        value = loss(x, y)
        assert value.isfinite()
        assert not torch.autograd.grad(value, x)[0].isnan().any()
        assert loss.bank.isfinite().all()


def test_the_bank_counts_alike_on_the_host_and_in_a_graph(monkeypatch):
    """Batches of any size, one beyond the bank; a pointer that others move; a bank that moves to another dtype."""
    torch.manual_seed(0)
    host = lightly.MemoryBankModule((10, 4), feature_dim_first=False)
    graph = copy.deepcopy(host)
    for i, rows in enumerate((3, 3, 3, 3, 12, 1, 10, 9, 1)):
        keys = torch.randn(rows, 4)
        before = host.bank.clone()
        output, bank = host(keys, update=True)
        assert output is keys
        assert torch.equal(bank, before)
        with monkeypatch.context() as patch:
            patch.setattr(lightly, "_is_readable", lambda ptr: False)
            graph.replace_oldest(keys)
        assert torch.equal(host.bank, graph.bank)
        assert torch.equal(host.bank_ptr, graph.bank_ptr)
        if i == 0:
            assert torch.equal(host.bank[:3], keys)
            assert host.bank_ptr.item() == 3
        if i == 2:
            host.bank_ptr.fill_(1), graph.bank_ptr.fill_(1)
        if i == 3:
            assert torch.equal(host.bank[1:4], keys)
            host, graph = (pickle.loads(pickle.dumps(bank.double())) for bank in (host, graph))
    assert host(keys)[1].shape == (10, 4)
    assert lightly.MemoryBankModule((10, 4))(keys)[1].shape == (4, 10)
    assert lightly.MemoryBankModule(0)(keys) == (keys, None)
    assert not host.state_dict()
    with pytest.raises(ValueError, match=r"size \(10, -1\), all entries must be non-negative."):
        lightly.MemoryBankModule((10, -1))


class Writes(TorchDispatchMode):
    """Names of the ops that are no views, while this mode is on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_an_update_of_the_bank_is_a_copy_and_a_fill():
    bank, keys = lightly.MemoryBankModule((10, 4)), torch.zeros(3, 4)
    for expected in (["_local_scalar_dense", "copy_", "fill_"], ["copy_", "fill_"]):  # the pointer is read once
        with Writes() as seen:
            bank.replace_oldest(keys)
        assert seen.names == expected


@pytest.mark.parametrize("most", [small.MOST_LOGITS, 0])
def test_a_bank_gives_moco_and_a_gradient_to_both_views(most, monkeypatch):
    monkeypatch.setattr(small, "MOST_LOGITS", most)
    loss = lightly.NTXentLoss(0.2, (50, D))
    before = loss.bank.clone()

    def expected(x, y):
        logits = [(normalize(x) * normalize(y)).sum(1, keepdim=True), normalize(x) @ before.to(x).T]
        return cross_entropy(torch.cat(logits, 1) / 0.2, torch.zeros(B, dtype=torch.long))

    inputs = pair(unit=False)
    assert_same(loss, expected, inputs)  # although the bank has changed since
    assert torch.equal(loss.bank, torch.cat([vk.normalize(inputs[1]), before[B:]]))
    assert loss.bank_ptr.item() == B


def test_decoupled_and_supervised_losses_of_lightly():
    x, y = pair(unit=False)
    z0, z1 = normalize(x), normalize(y)
    assert_same(lightly.DCLLoss(0.2), lambda a, b: reference.ntxent(a, b, 0.2, decoupled=True), [x, y])
    weights = torch.rand(B)
    found = lightly.DCLLoss(0.2, weight_fn=lambda a, b: weights)(x, y)
    plain = reference.ntxent(x, y, 0.2, decoupled=True)
    torch.testing.assert_close(found, plain + ((1 - weights) * (z0 * z1).sum(1) / 0.2).mean())
    assert lightly.DCLLoss()(x[:1], y[:1]) == 0
    weights = lightly.negative_mises_fisher_weights(z0, z1, 0.3)
    torch.testing.assert_close(weights, 2 - B * ((z0 * z1).sum(1) / 0.3).softmax(0))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    expected = plain + ((1 - weights) * (z0 * z1).sum(1) / 0.2).mean()
    torch.testing.assert_close(lightly.DCLWLoss(0.2, 0.3)(x, y), expected)

    labels = torch.arange(B) // 3
    for given in (labels, labels.float() / 7 - 0.5, labels.half(), labels.to(torch.uint8)):
        assert_same(
            lambda a, b, given=given: lightly.SupConLoss(0.2)(a, b, given),
            lambda a, b: reference.supcon_loss(torch.cat([a, b]), labels.repeat(2), temperature=0.2) * 0.2,
            [x, y],
        )
    assert torch.equal(lightly.SupConLoss(0.2, rescale=False)(x, y), vk.ntxent(x, y, 0.2))


def test_lightlys_decoupled_losses():
    peer = pytest.importorskip("lightly.loss.dcl_loss")
    inputs = pair(unit=False)

    def distances(a, b):
        return (a - b).square().sum(1)

    for name, options in (("DCLLoss", (0.2,)), ("DCLLoss", (0.2, distances)), ("DCLWLoss", (0.3, 0.7))):
        assert_same(*(getattr(module, name)(*options) for module in (lightly, peer)), inputs)
