"""Two GGUF files compared: here, because the maker of tiny GGUF files is."""

from pathlib import Path

import gguf

from dropformer.eval.compare.compare import CompareRequest, compare
from dropformer.metrics.calibration.settings import Calibration


def test_a_gguf_file_is_compared_and_its_conversion_removed(tiny, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("hello, all the hens here. " * 20, encoding="utf-8")
    files = [
        tiny.write(tmp_path / f"{kind.name}.gguf", tiny.llama(), kind)
        for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0)
    ]
    text = Calibration(str(tmp_path / "words.txt"), samples=2, length=16)
    request = CompareRequest([str(path) for path in files], "attn:1", calibration=text)
    found = compare(request)
    assert [c.label for c in found.checkpoints] == ["F32", "Q8_0"]
    exact, rounded = (c.similarity["mlp"] for c in found.checkpoints)
    assert exact != rounded and all(abs(a - b) < 0.02 for a, b in zip(exact, rounded, strict=True))
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]
    assert compare(request) == found
