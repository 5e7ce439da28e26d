"""The loader and the loss in a training loop of your own, without the trainer.

    python examples/plain_loop.py data/demo/store 20 8

Any network that returns one embedding an image will do. Negatives are the other videos of the batch. VITO also has a
moving average for the keys: ``target``.
"""

import copy
import sys

import timm
import torch
from torch.nn.functional import normalize

from vito_fast.config import SamplerConfig
from vito_fast.data.loader.loader import ClipLoader
from vito_kernels import info_nce

store, steps, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
device = "cuda" if torch.cuda.is_available() else "cpu"
loader = ClipLoader(store, batch_size, sampler=SamplerConfig(size=64, views=2), device=device)
online = timm.create_model("test_resnet", num_classes=64).to(device)
target = copy.deepcopy(online).requires_grad_(False)
optimizer = torch.optim.AdamW(online.parameters(), lr=1e-3)

done = 0
while done < steps:
    for batch in loader:  # an epoch; the next one has other frames and crops
        one, two = batch["views"]
        video = batch["video"].to(device)
        with torch.no_grad():
            keys = [normalize(target(view), dim=1) for view in (one, two)]
        queries = [normalize(online(view), dim=1) for view in (one, two)]
        loss = sum(
            info_nce(queries[a], keys[b], temperature=0.1, q_group=video, k_group=video) for a, b in ((0, 1), (1, 0))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.01)
        done += 1
        if done % 10 == 0 or done == steps:
            print(f"step {done}: loss {loss.item() / 2:.3f}")
        if done == steps:
            break
