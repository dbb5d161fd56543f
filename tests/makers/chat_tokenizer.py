"""A tokenizer of characters with a chat template."""


class Chat:
    """A tokenizer of one token a character, within a tiny model's vocabulary, with a chat template."""

    pad_token_id, bos_token_id, eos_token_id, sep_token_id = 0, None, 2, None
    chat_template = "as below"

    def __call__(self, text, add_special_tokens=True, truncation=False, max_length=None, **_):
        ids = [3 + ord(c) % 61 for c in text]
        return {"input_ids": ids[:max_length] if truncation else ids}

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False):
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")
