"""Curation: from any heap of videos to a class-balanced, audited pretraining set."""
