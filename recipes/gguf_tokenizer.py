"""The tokenizer of a GGUF file, with llama.cpp's pre-tokenizer for it.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it.  transformers knows some of the
names and silently uses GPT-2's rule for all others, which is wrong, for example, for SmolLM2, whose numbers are first
split into single digits.  Names and rules are those of llama.cpp, `src/llama-vocab.cpp`.
"""

from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dropformer.prune.errors import CheckpointError
from dropformer.prune.formats.gguf.header import GgufHeader

# llama.cpp splits off every \p{N} before it applies GPT-2's rule.
DIGITS_THEN_GPT2 = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
GPT2 = frozenset({"gpt-2", "phi-2", "jina-es", "jina-de", "jais", "mpt", "olmo", "roberta-bpe", "trillion"})


def _known_to_transformers() -> frozenset[str]:
    """The names that transformers handles correctly."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:
        return frozenset()
    return frozenset(getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {}))


def digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    """Split off every numeric character, then GPT-2's rule, without a prefix space."""
    single = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def gguf_tokenizer(path: Path, header: GgufHeader) -> PreTrainedTokenizerBase:
    """The tokenizer in the GGUF file at `path` with this header.

    Raises CheckpointError for an unknown pre-tokenizer: a guess would be silently wrong.
    """
    byte_level = header.text("tokenizer.ggml.model") == "gpt2"
    pre = header.text("tokenizer.ggml.pre")
    if byte_level and pre not in DIGITS_THEN_GPT2 | GPT2 | _known_to_transformers():
        raise CheckpointError(
            f"{path.name}: its pre-tokenizer {pre or '(none named)'} is unknown, and a guess would give wrong tokens; "
            "use the model's Hugging Face folder"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    if byte_level and pre in DIGITS_THEN_GPT2:
        tokenizer.backend_tokenizer.pre_tokenizer = digits_then_gpt2()
    return tokenizer
