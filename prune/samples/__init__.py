"""Small batches that any model can run: text, images, audio."""
