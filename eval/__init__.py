"""What a drop costs and saves: perplexity, tasks, speed, memory, comparison, report."""
