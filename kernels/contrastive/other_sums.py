"""Launchers of :mod:`.forward` for sums over keys other than the log-sum-exp alone: SupCon, SigLIP and retrieval."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vito_kernels._core.lazy_triton import cdiv
from vito_kernels.contrastive import large_dim
from vito_kernels.contrastive.forward import VARIANTS, lse_tile, online_only_dtype, run_lse, split_of
from vito_kernels.contrastive.terms import Mask
from vito_kernels.contrastive.tile_configs import matrices, output_chunks


def launch_label_lse(
    q: Tensor, k: Tensor, scale: Tensor, mask: Mask, q_label: Tensor, k_label: Tensor, done: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse2, lse_residual, distances, counts), each (S, M), of splits of all keys that ``mask`` leaves.

    Positives are its keys of the query's label: their sum of logits less |scale| log2(e), and their number.
    """
    M, N, D, (left, right) = q.shape[0], k.shape[0], q.shape[1], matrices(q, k)
    tiles = [lse_tile(variant, D, q.dtype, mask, False, "labels") for variant in VARIANTS]
    split_keys, splits = split_of(cdiv(M, tiles[0].block_m), N, tiles, q)
    lse2, lse_residual, distances, counts = (scale.new_empty(splits, M) for _ in range(4))
    mean = scale.new_empty(splits, 0, D)
    given = left, right, scale, mask, lse2, lse_residual, mean
    sums: dict[str, Any] = {"kind": "labels", "labels": (q_label, k_label), "distances": distances, "counts": counts}
    if online_only_dtype(q.dtype, False):
        run_lse("online", *given, None, (0, 0), split_keys, **sums, done=done)
    else:
        trusted = torch.empty(splits, M, dtype=torch.int8, device=q.device)
        run_lse("fixed", *given, trusted, (0, 0), split_keys, **sums)
        run_lse("online", *given, trusted, (0, 0), split_keys, done=done)
    return lse2, lse_residual, distances, counts


def launch_sums(
    kind: str,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    offset: Tensor,
    mask: Mask,
    compute_mean: bool,
    done: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over keys (S, M), (S, M) and (S, M, D) or (S, 0, D), of the splits, of a kind other than log-sum-exp.

    "sigmoid": of log2(1 + 2^s), p = 1 / (1 + 2^-s) and p k, with s the logit plus ``offset`` () in units of log 2.
    "rank": how many logits are above ``offset`` (M,); the second is unused.
    """
    M, N, D, (left, right) = q.shape[0], k.shape[0], q.shape[1], matrices(q, k)
    if kind == "sigmoid" and large_dim.supports("mean" if compute_mean else "lse", D, q.dtype):
        sums, shares, mean = large_dim.sigmoids(left.tensor, right.tensor, scale, offset, mask, gather=compute_mean)
        if done is not None:
            done.zero_()
        return sums, shares, mean[None]
    tile = lse_tile("fixed", D, q.dtype, mask, compute_mean, kind)
    split_keys, splits = split_of(cdiv(M, tile.block_m), N, [tile], q)
    first, second = scale.new_empty(splits, M), scale.new_empty(splits, M)
    mean = scale.new_empty(splits, M if compute_mean else 0, D)
    for chunks in output_chunks(D, tile) if compute_mean else [(0, 0)]:
        given = left, right, scale, mask, first, second, mean, None, chunks, split_keys
        run_lse("fixed", *given, kind=kind, offset=offset, done=done)
    return first, second, mean
