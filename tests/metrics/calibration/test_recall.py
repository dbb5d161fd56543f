"""Text that needs its far past."""

from itertools import islice

from dropformer.metrics.calibration.recall import APART, PASSAGE, recall
from dropformer.metrics.calibration.text import documents


def test_a_passage_comes_again_after_the_distances_in_turn():
    source = "".join(chr(97 + i * i % 23) for i in range(60_000))
    for text, apart in zip(recall([source]), APART, strict=False):
        passage = text.split("\n\n")[1]
        assert len(passage) == PASSAGE
        assert text.rindex(passage) - text.index(passage) == PASSAGE + apart + 4  # two blank lines


def test_every_key_that_is_asked_for_was_told():
    text = next(documents("recall"))
    told, asked = text.split("\n\n")[0], text.rstrip().split("\n\n")[-1]
    for line in told.splitlines():
        name, key = line.split()[0], line.split()[3]
        assert f"Which key does {name} keep? Key {key}." in asked


def test_the_text_is_the_same_every_time():
    assert list(islice(documents("recall"), 2)) == list(islice(documents("recall"), 2))
