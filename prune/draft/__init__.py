"""A pruned model as the draft of the model it came from (speculative decoding, arXiv 2211.17192)."""
