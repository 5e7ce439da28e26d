"""Code that builds the logits itself: two lines become one, and the matrix is never in memory.

    - logits = q @ k.T / temperature
    - loss = cross_entropy(logits, torch.arange(len(q)))
    + loss = info_nce(q, k, temperature=temperature)

info-nce-pytorch normalizes its arguments, so the call does:

    - loss = InfoNCE(temperature=0.1)(q, k)
    + loss = InfoNCELoss(temperature=0.1)(normalize(q, dim=1), normalize(k, dim=1))

Run: python examples/cross_entropy.py
"""

import torch
from torch.nn.functional import cross_entropy, normalize

from vito_kernels import info_nce

q, k = (normalize(torch.randn(256, 128), dim=1) for _ in range(2))
theirs = cross_entropy(q @ k.T / 0.1, torch.arange(len(q)))
ours = info_nce(q, k, temperature=0.1)
print(f"cross_entropy {theirs.item():.6f}, info_nce {ours.item():.6f}")
