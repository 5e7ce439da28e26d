"""Shared by every op: argument checks, lazy Triton, autograd glue."""
