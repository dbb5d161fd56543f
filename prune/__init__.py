"""What to drop and how: architecture, plan, surgery, checkpoint, load, export formats."""
