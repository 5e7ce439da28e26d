"""open_clip: one import changes, and the loss is built with the arguments it had.

    - from open_clip.loss import ClipLoss
    + from vito_kernels.adapters.open_clip import ClipLoss

    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    task = CLIPTask(model, loss=loss)  # an open_clip with tasks takes it there

Run: python examples/open_clip_loss.py
"""

import torch
from torch.nn.functional import normalize

from vito_kernels.adapters.open_clip import ClipLoss

loss = ClipLoss()
image, text = (normalize(torch.randn(64, 512), dim=1).requires_grad_() for _ in range(2))
log_scale = torch.nn.Parameter(torch.tensor(2.66))
value = loss(image, text, log_scale.exp())
value.backward()
print(f"loss {value.item():.4f}, d loss / d log scale {log_scale.grad.item():.4f}")
