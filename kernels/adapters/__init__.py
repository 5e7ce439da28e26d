"""Drop-in losses with the signatures of other codebases."""
