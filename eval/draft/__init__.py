"""What drafting costs and gives: steps against bytes, text, acceptance and tokens per second, measured."""
