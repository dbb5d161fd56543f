"""Which layers to drop: selection, budgets, strategies."""
