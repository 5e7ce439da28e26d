"""Batch norm with the residual sum and ReLU that follow it, as one op."""
