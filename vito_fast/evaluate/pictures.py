"""Pictures for the card."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_strip(path: Path, pictures: list[np.ndarray], height: int = 150) -> str:
    """Pictures side by side in one file at ``height``; returns its name."""
    images = [Image.fromarray(p) for p in pictures]
    images = [i.resize((max(1, round(i.width * height / i.height)), height)) for i in images]
    strip = Image.new("RGB", (sum(i.width for i in images) + 4 * (len(images) - 1), height), "white")
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width + 4
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path)
    return path.name
