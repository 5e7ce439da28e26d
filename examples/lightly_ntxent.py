"""lightly: the line that changes, and the one that need not.

    - from lightly.loss import NTXentLoss
    + from vito_kernels.adapters.lightly import NTXentLoss

    criterion = NTXentLoss(temperature=0.1, gather_distributed=True)

Run: python examples/lightly_ntxent.py
"""

import torch

from vito_kernels.adapters.lightly import NTXentLoss

criterion = NTXentLoss(temperature=0.1)
first, second = (torch.randn(64, 128, requires_grad=True) for _ in range(2))
value = criterion(first, second)
value.backward()
print(f"loss {value.item():.4f}, gradient norm {first.grad.norm().item():.4f}")
