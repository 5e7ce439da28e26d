"""Videos in, a store out."""
