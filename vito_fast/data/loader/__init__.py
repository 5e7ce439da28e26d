"""A store in, training views out."""
