"""Mutated copies of a tiny checkpoint: values, types, sizes and links that no honest tool writes."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUGE = [0, -1, 1, 3, 7, 1 << 31, 10**9, 10**18, -(10**9), 1e308, -0.5, 1e-320]
ODD = [None, True, "", "x", "../..", "$a$", "[red]", "/etc/passwd", [], [None], {}, {"a": {}}, [[1, 2]], "nan"]
NESTED: Any = "deep"
for _ in range(200):
    NESTED = [NESTED]


def value(draw: random.Random, old: Any) -> Any:
    """Another value than an honest one, sometimes of its type."""
    if isinstance(old, list) and old and draw.random() < 0.5:
        return draw.choice([old * 2, old[:-1], [None, *old[1:]], old[::-1], [*old, 10**9]])
    if isinstance(old, str) and draw.random() < 0.3:
        return draw.choice([old.upper(), old + "x", old * 1000])
    return draw.choice([*HUGE, *ODD, *([NESTED] if draw.random() < 0.3 else [])])


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of JSON content, a hundred at most of any one list."""
    if isinstance(content, dict):
        here = [(content, key) for key in content]
    elif isinstance(content, list):
        here = [(content, i) for i in range(min(len(content), 100))]
    else:
        return []
    return here + [place for owner, key in here for place in places(owner[key])]


def change_json(raw: bytes, draw: random.Random) -> bytes:
    """JSON with one to three of its values, or keys, replaced, removed or added."""
    content = json.loads(raw)
    for _ in range(draw.randint(1, 3)):
        found = places(content)
        owner, key = draw.choice(found) if found else (content, None)
        if key is None:
            break
        how = draw.random()
        if how < 0.7:
            owner[key] = value(draw, owner[key])
        elif how < 0.85 and isinstance(owner, dict):
            del owner[key]
        elif isinstance(owner, dict):
            owner[draw.choice(["x", *MEANT])] = value(draw, None)
    return json.dumps(content).encode()


MEANT = ["architectures", "num_hidden_layers", "num_labels", "layer_types", "auto_map", "quantization_config"]
MEANT += ["per_layer_config", "transformers_weights", "attn_implementation", "tie_word_embeddings", "rope_parameters"]
MEANT += ["id2label", "text_config", "dtype", "num_nextn_predict_layers", "is_encoder_decoder", "pad_token_id"]
MEANT += ["base_model_type", "head_dim", "sliding_window"]


def change_bytes(raw: bytes, draw: random.Random) -> bytes:
    """A file cut short, grown, or with a few bytes of its beginning flipped."""
    how = draw.random()
    if how < 0.25:
        return raw[: draw.randrange(len(raw))]
    if how < 0.4:
        return raw + bytes(draw.randrange(1, 100))
    data = bytearray(raw)
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(min(len(data), 4096))] = draw.randrange(256)
    return bytes(data)


def change_header(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header's JSON is another."""
    length = int.from_bytes(raw[:8], "little")
    header = change_json(raw[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def mutant(source: Path, target: Path, seed: int) -> str:
    """Copy `source` to `target` with one file mutated; says what was done."""
    draw = random.Random(seed)
    shutil.copytree(source, target)
    name = draw.choice(sorted(path.name for path in target.iterdir()) + ["config.json"] * 6)
    path = target / name
    if draw.random() < 0.08:
        path.unlink()
        special: Callable[[Path], None] = draw.choice(
            [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/etc/passwd"), lambda p: p.symlink_to(p.name)]
        )
        special(path)
        return f"{name} became something else"
    raw = path.read_bytes()
    if name.endswith(".safetensors") and draw.random() < 0.7:
        path.write_bytes(change_header(raw, draw))
    elif name.endswith(".json") and draw.random() < 0.85:
        path.write_bytes(change_json(raw, draw))
    else:
        path.write_bytes(change_bytes(raw, draw))
    return f"{name} changed"
