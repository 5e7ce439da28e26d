"""Races against the reference, the peers and the machine's own limit. Run ``python -m bench``."""
