"""What every fused op computes, in plain PyTorch: functions of the same names and arguments as the fused ones."""

from .photometric import photometric
from .pooling import attention_pool

__all__ = ["attention_pool", "photometric"]
