"""The objective: the queries of each view find the same clip's key in each other view.

Legend: V views, B clips of this rank, N clips of all ranks, D embedding width, S levels, E embeddings of an image. E is
1 with concatenated heads, else S.

The contrastive term of view a against view b is, with unit queries q and keys k and temperature t,

    -log  exp(q_i.k_i/t) / (exp(q_i.k_i/t) + sum over keys j of other videos exp(q_i.k_j/t))

averaged over the clips i. The keys are those of view b (``cross_view``, MoCLR), or of views a and b (``both_views``,
DetCon-B: a batch of distinct videos gives 2N-1 logits). The objective is the sum over ordered pairs (a,b) of views
and over embeddings.
"""

from typing import Any

import torch
from torch import Tensor

from vito_fast.config import LossConfig
from vito_fast.train.keys import GatheredKeys
from vito_kernels import info_nce, multi_view_info_nce


def _key_rows(keys: Tensor, video: Tensor, a: int, b: int, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The candidate keys (N or 2N, D) of view a's queries for view b, and their videos."""
    if config.negatives == "cross_view":
        return keys[b], video
    return torch.cat([keys[b], keys[a]]), torch.cat([video, video])


def objective(queries: list[Tensor], keys: GatheredKeys, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Sums the terms over ordered pairs of views and over embeddings. Gradient flows to the queries only.

    A small crop is paired with every view but its own.

    Args:
        queries: E times (V+S,B,D) of unit rows: those of V views, then of S small crops, as many of each view.
        keys: Keys of all ranks.
        config: The loss; with ``byol`` a term is 2 - 2 q_i.k_i.

    Returns:
        (objective (), mean term of each embedding (E,), detached). The mean term compares with ``chance``.
    """
    views, (rows, clips, _) = len(keys.embeddings[0]), queries[0].shape
    own = keys.own(clips)
    view_of = [*range(views), *(crop * views // (rows - views) for crop in range(rows - views))]
    pairs = [(a, b) for a in range(rows) for b in range(views) if b != view_of[a]]

    def mean_term(q: Tensor, k: Tensor) -> Tensor:
        if config.name == "byol":
            return torch.stack([(2 - 2 * (q[a] * k[b, own]).sum(-1)).mean() for a, b in pairs]).mean()
        options: dict[str, Any] = {"temperature": config.temperature, "q_group": keys.video[own]}
        terms, rest = [], pairs
        if config.negatives == "cross_view":
            count, rest = views * (views - 1), pairs[views * (views - 1) :]
            whole = {"positive_offset": own.start, "k_group": keys.video, "reduction": "mean", **options}
            mean = multi_view_info_nce(q[:views], k, **whole)
            if not rest:
                return mean
            terms = [mean] * count
        positive = torch.arange(own.start, own.stop, device=q.device)
        for a, b in rest:
            candidates, groups = _key_rows(k, keys.video, view_of[a], b, config)
            terms.append(info_nce(q[a], candidates, positive=positive, k_group=groups, **options))
        return torch.stack(terms).mean()

    by_embedding = torch.stack([mean_term(q, k) for q, k in zip(queries, keys.embeddings, strict=True)])
    return by_embedding.sum() * len(pairs), by_embedding.detach()


@torch.no_grad()
def chance(keys: GatheredKeys, clips: int, config: LossConfig) -> Tensor:
    """log(negatives + 1), averaged over this rank's queries (): the loss of a network with equal similarities.

    NaN for BYOL, which has no negatives.
    """
    if config.name == "byol":
        return torch.tensor(torch.nan, device=keys.video.device)
    negatives = (keys.video[keys.own(clips), None] != keys.video).sum(1)
    return torch.log1p(negatives * (2 if config.negatives == "both_views" else 1)).mean()


@torch.no_grad()
def accuracy(queries: list[Tensor], keys: GatheredKeys, config: LossConfig) -> Tensor:
    """Share of view 0's queries that are nearer to their key in view 1 than to every negative, by embedding (E,)."""
    own = keys.own(queries[0].shape[1])
    video = keys.video[own]
    result = []
    for q, k in zip(queries, keys.embeddings, strict=True):
        rows, groups = _key_rows(k, keys.video, 0, 1, config)
        similarity = q[0] @ rows.T
        positive = (q[0] * k[1, own]).sum(-1)
        hardest = similarity.masked_fill(video[:, None] == groups, -torch.inf).amax(1)
        result.append((positive > hardest).float().mean())
    return torch.stack(result)


@torch.no_grad()
def embedding_std(queries: list[Tensor]) -> Tensor:
    """Collapse alarm, by embedding (E,): sqrt(D) times the mean over dimensions of the standard deviation over clips of
    view 0's unit rows. 1 = spread evenly over the sphere, 0 = all alike."""
    return torch.stack([q[0].std(0, correction=0).mean() * q.shape[-1] ** 0.5 for q in queries])


@torch.no_grad()
def embedding_rank(queries: list[Tensor]) -> Tensor:
    """Dimensions that view 0's unit rows use, by embedding (E,): D or clips - 1 = all alike, 1 = a line, 0 = a point.

    The participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of their covariance over clips.
    """
    ratios = []
    for q in queries:
        centered = q[0] - q[0].mean(0)
        square = centered.T @ centered if len(centered) > centered.shape[1] else centered @ centered.T
        ratios.append(square.trace().square() / square.square().sum().clamp(min=torch.finfo(square.dtype).tiny))
    return torch.stack(ratios)


@torch.no_grad()
def attention_entropy(weights: list[Tensor]) -> Tensor:
    """Mean entropy of the pooling weights (B,L) as a share of log L, by level (S,): 1 = plain averaging."""
    shares = []
    for w in weights:
        entropy = torch.special.entr(w.float()).sum(1).mean()
        shares.append(entropy / torch.log(torch.tensor(max(w.shape[1], 2), device=w.device)))
    return torch.stack(shares)
