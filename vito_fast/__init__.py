"""vito-fast: self-supervised image encoders from video."""
