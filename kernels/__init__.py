"""Fused contrastive-learning kernels; see ``vito_kernels.reference`` for their specification."""
