"""vito-fast: self-supervised image encoders from video."""

__version__ = "0.1.0"
