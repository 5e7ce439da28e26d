"""Features of images, computed once: cached by encoder, data and transform."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vito_fast.evaluate.task import digest
from vito_fast.files import atomic_write


@dataclasses.dataclass(frozen=True)
class FeatureCache:
    """A folder of safetensors files, each named by the digest of everything that its tensors depend on."""

    folder: Path

    def get(
        self, encoder: str, data: str, transform: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors of this encoder, data and transform: read, or computed and then written.

        Args:
            encoder, data: Digests (``Encoded.sha256``, the manifest's ``sha256``).
            transform: Whatever else the tensors depend on, as JSON values: sizes, layers, options.
            compute: Makes the tensors by name.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        path = self.folder / f"{digest({'encoder': encoder, 'data': data, 'transform': transform})}.safetensors"
        if path.is_file():
            try:
                return load_file(path)
            except SafetensorError:  # torn by a failing disk: made again
                path.unlink()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            save_file(tensors, partial)
        return tensors
