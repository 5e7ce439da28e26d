"""The loader and the loss in PyTorch Lightning.

    pip install lightning
    python examples/lightning_loop.py data/demo/store 20 8

The loader already divides clips among ranks: ``use_distributed_sampler=False``. On several ranks the
loss has the negatives of all.
"""

import os
import sys

import lightning
import timm
import torch
from torch.nn.functional import normalize

from vito_fast.config import SamplerConfig
from vito_fast.data.loader.loader import ClipLoader
from vito_kernels import info_nce
from vito_kernels.distributed import global_info_nce


class Contrastive(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("test_resnet", num_classes=64)

    def training_step(self, batch: dict[str, object], _: int) -> torch.Tensor:
        one, two = (normalize(self.network(view), dim=1) for view in batch["views"])
        video = batch["video"].to(self.device)
        contrast = global_info_nce if self.trainer.world_size > 1 else info_nce
        loss = contrast(one, two, temperature=0.1, q_group=video, k_group=video)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


store, steps, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
loader = ClipLoader(
    store, batch_size, rank=rank, world_size=size, sampler=SamplerConfig(size=64, views=2), device=device
)
trainer = lightning.Trainer(
    max_steps=steps, use_distributed_sampler=False, log_every_n_steps=1, enable_checkpointing=False, logger=False
)
trainer.fit(Contrastive(), loader)
print(f"loss {trainer.callback_metrics['loss'].item():.3f} after {trainer.global_step} steps")
