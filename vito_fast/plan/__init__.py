"""A prediction of a run's time and memory, before it starts."""
