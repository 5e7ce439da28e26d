"""Evaluation: published protocols, each one a task with presets, and results that say how they were made."""
