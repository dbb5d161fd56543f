"""DeciLM checkpoints: which families they hold, the config class that travels with them, and loading them."""
