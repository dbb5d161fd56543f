"""The rungs between an attention layer and nothing: what each keeps, costs, and is written as."""
