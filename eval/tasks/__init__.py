"""Tasks through lm-eval: prompts, packing, shared prefixes, paired tests."""
