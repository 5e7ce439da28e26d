"""Any timm network that can return intermediate features, behind the same interface as ``ResNet``."""

from typing import Any

import torch
from torch import Tensor, nn

from vito_fast.errors import UserError


class TimmBackbone(nn.Module):
    """``forward(x (B,3,H,W)) -> [last ``scales`` feature maps (B,C,H',W'), coarsest last]`` of
    ``timm.create_model(name)``.

    ``body`` is the plain timm model without its classifier, so its state dict has timm's own names.
    """

    def __init__(self, name: str, scales: int) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError(f"backbone 'timm:{name}' needs timm: pip install timm") from None
        try:
            self.body: Any = timm.create_model(name, pretrained=False, num_classes=0)
        except RuntimeError as error:
            raise UserError(f"backbone 'timm:{name}': {error}") from None
        info = getattr(self.body, "feature_info", None)
        if info is None or not hasattr(self.body, "forward_intermediates"):
            raise UserError(f"backbone 'timm:{name}' cannot return intermediate features; choose another network")
        levels = [info[i] for i in range(len(info))]
        if scales > len(levels):
            raise UserError(f"backbone 'timm:{name}' has {len(levels)} feature levels, model.scales asks for {scales}")
        self.name, self.scales = f"timm:{name}", scales
        self.channels = [level["num_chs"] for level in levels][-scales:]
        self.strides = [level["reduction"] for level in levels][-scales:]
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        """Parameters that no feature depends on, as of a layer before the classifier, learn nothing: LARS would only
        shrink them, and DDP wait for their gradients. Found on ``meta``, where nothing is computed.
        """
        tensors = [*self.named_parameters(), *self.named_buffers()]
        learned = {name: t for name, t in tensors if t.requires_grad}
        meta = {name: torch.empty_like(t, device="meta", requires_grad=t.requires_grad) for name, t in tensors}
        images = torch.empty(1, *self.body.default_cfg["input_size"], device="meta")
        try:
            with torch.enable_grad():
                features = torch.func.functional_call(self.eval(), meta, (images,))
                total = torch.stack([f.float().sum() for f in features]).sum()
        except RuntimeError:  # of a network that looks at values, of which there are none
            return
        finally:
            self.train()
        gradients = torch.autograd.grad(total, [meta[name] for name in learned], allow_unused=True)
        for parameter, gradient in zip(learned.values(), gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def forward(self, x: Tensor) -> list[Tensor]:
        try:
            features: list[Tensor] = self.body.forward_intermediates(x, indices=self.scales, intermediates_only=True)
        except AssertionError as error:  # of networks made for one size
            wanted = " x ".join(map(str, self.body.default_cfg["input_size"][1:]))
            raise UserError(
                f"model.backbone {self.name!r} takes no images of {x.shape[2]} x {x.shape[3]} ({error}): set "
                f"sampler.size as it was made for, {wanted}, or choose another network"
            ) from None
        return features
