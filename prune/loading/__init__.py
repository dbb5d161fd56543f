"""How dense and pruned checkpoints are loaded."""
