"""Contrastive losses that never store the similarity matrix: public ops, Triton kernels, CPU path."""
