"""The two orders of a rotary head's rows, on bytes, so that quantized rows pass as they are.

transformers and qwen2's graph turn value j of a head with value j + D/2; the graphs of llama and deci turn
value 2j with 2j + 1.  Rows of queries and keys so interleaved give the same attention.
"""


def interleaved(data: bytes | memoryview, heads: int, head_width: int) -> bytes:
    """Rows 0, D/2, 1, D/2 + 1, ... of each head.  data: heads * D rows of equal size."""
    row, half = len(data) // (heads * head_width), head_width // 2
    order = [j + part for j in range(half) for part in (0, half)]
    firsts = (head * head_width for head in range(heads))
    return b"".join(bytes(data[(first + j) * row : (first + j + 1) * row]) for first in firsts for j in order)
