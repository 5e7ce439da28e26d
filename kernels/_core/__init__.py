"""What every op is built from: argument checks, lazy Triton, autograd glue."""
