"""Prompts with completions, or conversations; only the completions are scored.

A row of a .jsonl is {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}, with
the tokenizer's chat template applied; the assistant's turns are the completions.  Depth pruning breaks reasoning
first, which perplexity on plain text does not show: calibrate and validate on the data that the model is used for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dropformer.metrics.calibration.text import json_row
from dropformer.prune.errors import CalibrationError, reason

Row = tuple[list[int], list[bool]]  # token ids, and which of them are scored
EXPECTED = '"text", "prompt" with "completion", or "messages"'


def has_completions(name: str) -> bool:
    """Whether this is a .jsonl file whose first row has a completion or messages."""
    first = _first_row(name)
    return "text" not in first and bool({"completion", "messages"} & first.keys())


def _first_row(name: str) -> dict[str, Any]:
    """The first row of a .jsonl file; empty for other files and if the row is not an object."""
    path = Path(name)
    if path.suffix != ".jsonl" or not path.is_file():
        return {}
    with path.open("rb") as lines:
        first = json_row(next(lines, b""), f"{path}, line 1")
    return first if isinstance(first, dict) else {}


def completion_rows(name: str, tokenizer: Any, length: int) -> Iterator[Row]:
    """Each row's tokens, truncated to `length`; rows without a completion token within that are skipped.

    Raises CalibrationError, with the line number, for a malformed row and for a template that cannot be applied.
    """
    for where, row in _rows(name):
        ids, counts = _tokens(row, tokenizer, where)
        if any(counts[1:length]):  # the first token has no prediction
            yield ids[:length], counts[:length]


def has_prompts(name: str) -> bool:
    """Whether this is a .jsonl file whose first row has `prompt` or `messages`."""
    return bool({"prompt", "messages"} & _first_row(name).keys())


def prompt_rows(name: str, tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of each row's prompt, or of its conversation up to the assistant's last turn.  Raises as above."""
    for where, row in _rows(name):
        if isinstance(row, dict) and "messages" in row:
            ids, counts = _conversation(_messages(_answered(row["messages"]), where), tokenizer, where)
            start = next(i for i in reversed(range(len(ids))) if counts[i] and (i == 0 or not counts[i - 1]))
            yield ids[:start]
        elif isinstance(row, dict) and isinstance(row.get("prompt"), str):
            ids, counts = _tokens({"prompt": row["prompt"], "completion": ""}, tokenizer, where)
            yield ids[: len(ids) - sum(counts)]
        else:
            raise CalibrationError(f'{where}: expected a JSON object with "prompt" or "messages", as in line 1')


def _answered(messages: Any) -> Any:
    """The conversation, with an empty assistant turn appended if it ends with another role's turn."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    asks = isinstance(last, Mapping) and last.get("role") != "assistant"
    return [*messages, {"role": "assistant", "content": ""}] if asks else messages


def _rows(name: str) -> Iterator[tuple[str, Any]]:
    """Each row's file and line, for error messages, and its content; None if it is not JSON."""
    with Path(name).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{name}, line {number}"
            yield where, json_row(line, where)


def _tokens(row: Any, tokenizer: Any, where: str) -> Row:
    if isinstance(row, dict) and "messages" in row:
        return _conversation(_messages(row["messages"], where), tokenizer, where)
    pair = [row.get(key) for key in ("prompt", "completion")] if isinstance(row, dict) else []
    texts = [text for text in pair if isinstance(text, str)]
    if len(texts) != 2:
        raise CalibrationError(f"{where}: expected a JSON object with {EXPECTED}, the same as in line 1")
    start = _ids(tokenizer, texts[0], special=True)
    start = start[:-1] if start and start[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else start
    rest = _ids(tokenizer, texts[1], special=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return start + rest + end, [False] * len(start) + [True] * (len(rest) + len(end))


def _messages(found: Any, where: str) -> list[dict[str, str]]:
    good = isinstance(found, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in found
    )
    if not good or not any(m["role"] == "assistant" for m in found):
        raise CalibrationError(
            f"{where}: expected `messages` to be a list of objects with `role` and `content` as texts, one or more of "
            "them the assistant's"
        )
    return [dict(m) for m in found]


def _conversation(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Row:
    """A conversation rendered by the chat template; the assistant's turns are scored.

    A turn is the rendered text through that turn, minus the rendered generation prompt before it.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"{where}: the tokenizer has no chat template for `messages`; give rows of `prompt` and `completion`"
        )
    try:
        whole = _templated(tokenizer, messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = _templated(tokenizer, messages[:i], add_generation_prompt=True)
                after = _templated(tokenizer, messages[: i + 1])
                spans.append((len(before), len(after), whole.startswith(before) and whole.startswith(after)))
    except Exception as error:  # templates raise any type: roles that must alternate, no system turn allowed
        raise CalibrationError(f"{where}: the chat template cannot be applied: {reason(error)}") from None
    if not all(same for *_, same in spans):
        raise CalibrationError(
            f"{where}: the chat template writes earlier turns differently once others follow, so the assistant's turns "
            "cannot be told apart; give rows of `prompt` and `completion`"
        )
    ids: list[int] = []
    counts: list[bool] = []
    at = 0
    for start, end, _ in spans:
        for text, counted in ((whole[at:start], False), (whole[start:end], True)):
            part = _ids(tokenizer, text, special=False)
            ids += part
            counts += [counted] * len(part)
        at = end
    rest = _ids(tokenizer, whole[at:], special=False)
    return ids + rest, counts + [False] * len(rest)


def _templated(tokenizer: Any, messages: list[dict[str, str]], **say: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **say)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"] if text or special else []
