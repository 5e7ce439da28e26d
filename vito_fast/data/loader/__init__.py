"""The training loader: a store in, batches of augmented views out."""
