"""Other people's losses, each brought to the same calling convention, or named with the reason why it is not raced.

Every function of a family takes the *raw* embeddings and normalizes them itself, because most peers always do. All
candidates do so, ours included, and all gradients are those of the raw embeddings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from bench.harness import Candidate, Result, Role, absent, one_line, relative_error

Loss = Callable[[Tensor, Tensor], Tensor]
COMPILED = "torch.compile of the reference"
FULL_MATRIX = 4 * 2**30  # bytes that a peer may need for its matrices on a CPU; above it is named, not raced


def with_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Result]:
    """A candidate's call: the loss and its gradients with respect to those inputs that ask for one."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def call() -> Result:
        value = loss(*inputs)
        return (value, *torch.autograd.grad(value, wanted))

    return call


def truth_of(loss: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Result]:
    """The same in float64."""

    def call() -> Result:
        doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
        return with_gradients(loss, *doubles)()

    return call


def sampled(rows: Tensor) -> Callable[[Result, Result], float]:
    """Compares the loss and these rows of the gradient, where a float64 truth of all rows would take minutes."""

    def agree(got: Result, truth: Result) -> float:
        loss, gradient = got
        return relative_error([loss, gradient[rows]], truth) if gradient.isfinite().all() else float("inf")

    return agree


def truth_of_rows(
    q: Tensor, k: Tensor, temperature: float, rows: Tensor, two_sided: bool = False
) -> Callable[[], Result]:
    """The mean loss of all queries and these rows of its gradient: InfoNCE's, or with ``two_sided`` CLIP's.

    The gradient is float64's. The loss takes float32 logits, whose mean in float64 errs by some 1e-9, in half the time.
    """

    from vito_kernels import reference

    def call() -> Result:
        queries, keys = reference.normalize(q.detach().float()), reference.normalize(k)
        by_row = log_sums(queries, keys.float(), temperature)
        own = (queries * keys[: len(q)]).sum(1, dtype=torch.float64) / temperature
        some = q.detach()[rows].double().requires_grad_()
        logits = reference.normalize(some) @ keys.double().T / temperature
        total = cross_entropy(logits, rows, reduction="sum")
        loss = (by_row - own).mean()
        if two_sided:
            by_column = log_sums(keys.float(), queries, temperature)
            columns = (logits - by_column).exp().sum() - logits.gather(1, rows[:, None]).sum()  # gradients as of theirs
            total, loss = (total + columns) / 2, (loss + (by_column - own).mean()) / 2
        return loss, *torch.autograd.grad(total / len(q), some)

    return call


def log_sums(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Each query's logarithm of its sum of exponentials over the keys, all of length 1, in float64."""
    sums = []
    for rows in queries.split(2048):
        # Tiles of 16 MiB stay in malloc's hands; no logit is larger than 1 / temperature.
        tiles = ((rows @ columns.T).sub_(1).div_(temperature).exp_() for columns in keys.split(2048))
        sums.append(torch.stack([tile.sum(1).double() for tile in tiles]).sum(0))
    return torch.cat(sums).log() + 1 / temperature


def compiled(function: Callable[..., Tensor], *inputs: Tensor) -> Candidate:
    """``torch.compile`` of a reference with its gradients, for the shapes of ``inputs``."""
    torch._dynamo.reset()
    return Candidate(COMPILED, with_gradients(torch.compile(function, dynamic=False), *inputs), compiles=True)


def not_compiled(why: str) -> Candidate:
    """Where :func:`compiled` does not race, which can be the best peer there is."""
    return absent(COMPILED, why)


def not_imported(error: Exception) -> str:
    """Why a peer is absent whose import ended so: packages that do not fit each other raise anything."""
    return f"not installed ({error})" if isinstance(error, ImportError) else f"does not import ({one_line(error)})"


def peer(
    name: str,
    make: Callable[[], Callable[..., Tensor]],
    *inputs: Tensor,
    matrices: float = 0.0,
    cuda_only: bool = False,
    role: Role = "peer",
    note: str = "",
    truth: Callable[[], Result] | None = None,
) -> Candidate:
    """A candidate from a third-party package; ``matrices`` is how many bytes its M x N temporaries take.

    ``make`` imports the package and returns the loss. A peer that cannot race stays in the record with its
    reason: not installed, CUDA only, or too large for this machine's memory.
    """
    on_cuda = inputs[0].is_cuda
    if cuda_only and not on_cuda:
        return absent(name, "runs on CUDA only")
    room = torch.cuda.mem_get_info()[0] if on_cuda else FULL_MATRIX
    if matrices > room:
        return absent(name, f"its M x N temporaries need about {matrices / 2**30:.1f} GiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = make()
    except Exception as error:
        return absent(name, not_imported(error))
    return Candidate(name, with_gradients(loss, *inputs), role, note, truth)


def _info_nce_pytorch(temperature: float) -> Loss:
    return import_module("info_nce").InfoNCE(temperature=temperature)


def _metric_learning_info_nce(temperature: float) -> Loss:
    loss = import_module("pytorch_metric_learning.losses").NTXentLoss(temperature=temperature)

    def call(q: Tensor, k: Tensor) -> Tensor:
        labels = torch.arange(len(q), device=q.device)
        return loss(q, labels, ref_emb=k, ref_labels=labels.clone())  # the same object would mean "the same embeddings"

    return call


def _memeff_lit(temperature: float) -> Loss:
    return import_module("memeff").MemoryEfficientLiTLoss(temperature=temperature, stable=False)


def _open_clip(temperature: float) -> Loss:
    loss = import_module("open_clip.loss").ClipLoss()
    return lambda x, y: loss(normalize(x, dim=1), normalize(y, dim=1), 1 / temperature)


def _memeff_clip(temperature: float) -> Loss:
    return import_module("memeff").MemoryEfficientCLIPLoss(temperature=temperature, stable=False)


def _inf_cl(temperature: float) -> Loss:
    flash = import_module("inf_cl").cal_flash_loss

    def call(x: Tensor, y: Tensor) -> Tensor:
        x, y = normalize(x, dim=1), normalize(y, dim=1)
        head = min(256, x.shape[1])
        both = [flash(a, b, scale=1 / temperature, head_dim=head) for a, b in ((x, y), (y, x))]
        return (both[0] + both[1]).mean() / 2

    return call


def _inf_cl_one_sided(temperature: float) -> Loss:
    flash = import_module("inf_cl").cal_flash_loss

    def call(q: Tensor, k: Tensor) -> Tensor:
        head = min(256, q.shape[1])
        return flash(normalize(q, dim=1), normalize(k, dim=1), scale=1 / temperature, head_dim=head).mean()

    return call


def _lightly(temperature: float) -> Loss:
    return import_module("lightly.loss.ntx_ent_loss").NTXentLoss(temperature=temperature)


def _metric_learning_ntxent(temperature: float) -> Loss:
    losses = import_module("pytorch_metric_learning.losses")
    loss = losses.NTXentLoss(temperature=temperature)

    def call(z1: Tensor, z2: Tensor) -> Tensor:
        return loss(torch.cat([z1, z2]), torch.arange(len(z1), device=z1.device).repeat(2))

    return call


def one_sided(q: Tensor, k: Tensor, temperature: float) -> list[Candidate]:
    """Peers of InfoNCE with locked keys, and the two-sided loss of open_clip, the usual alternative, as context."""
    entries = len(q) * len(k) * q.element_size()
    triples = 8.0 * len(q) ** 2 * len(k)  # its mask holds every positive against every negative pair
    two_sided = truth_of(lambda x, y: _reference_clip(x, y, temperature), q, k)
    return [
        peer("info-nce-pytorch", lambda: _info_nce_pytorch(temperature), q, k, matrices=4 * entries),
        peer("pytorch-metric-learning", lambda: _metric_learning_info_nce(temperature), q, k, matrices=triples),
        peer("memeff (LiT)", lambda: _memeff_lit(temperature), q, k, cuda_only=True),
        peer("inf-cl (flash)", lambda: _inf_cl_one_sided(temperature), q, k, cuda_only=True),
        peer(
            "open_clip ClipLoss",
            lambda: _open_clip(temperature),
            q,
            k,
            matrices=8 * entries,
            role="context",
            note="two-sided: more work",
            truth=two_sided,
        ),
    ]


def _reference_clip(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    from vito_kernels import reference

    return reference.clip_loss(normalize(x, dim=1), normalize(y, dim=1), 1 / temperature)


def two_sided(x: Tensor, y: Tensor, temperature: float) -> list[Candidate]:
    """Peers of the CLIP loss."""
    entries = len(x) * len(y) * x.element_size()
    return [
        peer("open_clip", lambda: _open_clip(temperature), x, y, matrices=8 * entries),
        peer("memeff (CLIP)", lambda: _memeff_clip(temperature), x, y, cuda_only=True),
        peer("inf-cl (flash)", lambda: _inf_cl(temperature), x, y, cuda_only=True),
    ]


def self_similar(z1: Tensor, z2: Tensor, temperature: float) -> list[Candidate]:
    """Peers of NT-Xent."""
    entries = 4 * len(z1) * len(z2) * z1.element_size()
    triples = 8.0 * (2 * len(z1)) ** 3
    return [
        peer("lightly", lambda: _lightly(temperature), z1, z2, matrices=6 * entries),
        peer("pytorch-metric-learning", lambda: _metric_learning_ntxent(temperature), z1, z2, matrices=triples),
    ]


def supervised(z: Tensor, labels: Tensor, temperature: float) -> Candidate:
    """pytorch-metric-learning's SupCon on embeddings of the classes ``labels``."""

    def make() -> Callable[[Tensor], Tensor]:
        loss = import_module("pytorch_metric_learning.losses").SupConLoss(temperature=temperature)
        return lambda z: loss(z, labels)

    return peer("pytorch-metric-learning", make, z, matrices=8.0 * z.element_size() * len(z) ** 2)


def sigmoid(x: Tensor, y: Tensor, scale: float, bias: float) -> Candidate:
    """open_clip's SigLIP, of rows to be normalized."""

    def make() -> Loss:
        loss = import_module("open_clip.loss").SigLipLoss()
        return lambda x, y: loss(normalize(x, dim=1), normalize(y, dim=1), scale, bias)

    return peer("open_clip SigLipLoss", make, x, y, matrices=6.0 * x.element_size() * len(x) * len(y))


def paired(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Candidate:
    """info-nce-pytorch with negatives of each query; it normalizes."""

    def make() -> Loss:
        return import_module("info_nce").InfoNCE(temperature=temperature, negative_mode="paired")

    return peer("info-nce-pytorch", make, q, k, negatives, matrices=3.0 * negatives.nbytes)
