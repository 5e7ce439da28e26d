"""``model.init``: the weights that a new run starts from."""

from pathlib import Path

from torch import Tensor, nn

from vito_fast.model.pair import VitoModel
from vito_fast.model.weights import fitted, pretrained, read_weights
from vito_fast.train.checkpoint import find, named_as_one


def initialize(model: VitoModel, source: str) -> str:
    """Copies weights into the online and the target network.

    Args:
        model: The pair.
        source: A run or checkpoint, whose pools and heads are taken too where they fit; a ``.safetensors`` or ``.pth``
            file of the backbone under torchvision's or timm's names; or ``timm:NAME`` or ``torchvision:NAME``, that
            library's pretrained weights.

    Returns:
        A line about the source and the parts.

    Raises:
        UserError: no such source, or weights of another network.
    """
    path, online = Path(source), model.online
    rest: dict[str, Tensor] = {}
    if path.is_dir() or named_as_one(path):
        checkpoint = find(path)
        own = checkpoint.part("model.online.")
        state = {name.removeprefix("backbone."): t for name, t in own.items() if name.startswith("backbone.")}
        state = {name.removeprefix("body."): t for name, t in state.items()}
        mine = online.state_dict()
        rest = {
            n: t for n, t in own.items() if not n.startswith("backbone.") and n in mine and mine[n].shape == t.shape
        }
        path = checkpoint.path
    elif source.startswith(("timm:", "torchvision:")) and not path.exists():
        state = pretrained(source)
    else:
        state, _ = read_weights(path)
    body: nn.Module = getattr(online.backbone, "body", online.backbone)
    weights, notes = fitted(state, body, path)
    body.load_state_dict(weights)
    online.load_state_dict(rest, strict=False)
    model.target.load_state_dict({k: v for k, v in online.state_dict().items() if not k.startswith("predictors.")})
    parts = ["backbone", *sorted({name.split(".")[0] for name in rest})]
    return f"starts from {path if path.exists() else source}: {', '.join([*parts, *notes])}"
