"""Results as JSON, tables, pictures and an HTML page."""
