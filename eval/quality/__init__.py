"""What a drop costs in quality: perplexity, KL, outputs, probes, sweeps."""
