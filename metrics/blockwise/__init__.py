"""One block at a time: runners, residual streams, divergence from the dense model."""
