"""Reading a store: its description, index, packets and frames."""
