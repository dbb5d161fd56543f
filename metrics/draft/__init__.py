"""How often the dense model accepts what a draft says, and which draft gives the most tokens per second."""
