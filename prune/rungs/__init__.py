"""The forms between an attention layer and nothing: what each keeps and costs."""
