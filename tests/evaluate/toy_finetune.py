"""A model and data that the fine-tuning tests train, here so that other processes can import them.

``python toy_finetune.py WORK [kill_after_checkpoint]`` trains and writes the weights to WORK/final.safetensors.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from vito_fast.evaluate.finetune import Recipe, finetune


class ToyData:
    """Two classes of 8 x 8 images: a bright row or a bright column, at a random place, in noise."""

    def __len__(self):
        return 24

    def sample(self, index, rng):
        image = torch.from_numpy(rng.normal(0, 0.2, (3, 8, 8))).float()
        line = int(rng.integers(8))
        if index % 2:
            image[:, line] += 1
        else:
            image[:, :, line] += 1
        return image, index % 2

    def collate(self, samples):
        return {"images": torch.stack([s[0] for s in samples]), "labels": torch.tensor([s[1] for s in samples])}


class ToyModel(nn.Module):
    """Two convolutions with batch norm. The count of the second term differs from sample to sample."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)
        self.dropout = dropout

    def logits(self, batch):
        return self.head(F.dropout(self.backbone(batch["images"]).mean((2, 3)), self.dropout, self.training))

    def loss(self, batch):
        logits, labels = self.logits(batch), batch["labels"]
        each = F.cross_entropy(logits, labels, reduction="none")
        ones = labels == 1
        return {"all": (each.sum(), torch.tensor(float(len(each)))), "ones": (each[ones].sum(), ones.sum())}

    def predict(self, batch):
        return self.logits(batch).argmax(1)


RECIPE = Recipe(optimizer="sgd", lr=0.1, schedule="cosine", epochs=20, batch_size=6, weight_decay=1e-4)


def train(work, recipe=RECIPE, dropout=0.0, **options):
    options = {"workers": 0, "checkpoint_every": 7, **options}
    return finetune(ToyModel(dropout), ToyData(), recipe, Path(work), torch.device("cpu"), seed=3, **options)


def rank_main(rank, out, recipe):
    model = train(Path(out) / "ranks", recipe)
    if rank == 0:
        torch.save(model.state_dict(), Path(out) / "ranks.pth")


def main():
    work = Path(sys.argv[1])
    if len(sys.argv) > 2:
        from vito_fast.train import checkpoint

        write = checkpoint.write

        def write_and_die(path, *args):
            write(path, *args)
            if path.name == f"step-{int(sys.argv[2]):08d}.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.write = write_and_die
    torch.set_num_threads(1)
    torch.save(train(work, dropout=0.3).state_dict(), work / "final.pth")


if __name__ == "__main__":
    main()
