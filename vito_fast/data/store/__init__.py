"""Reading a store: its description, index, packets and frames. Nothing here imports packing or torch."""
