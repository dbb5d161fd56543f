from pathlib import Path

from markupsafe import Markup

from dropformer.eval.html import Section, page, paragraph, picture, table

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 16


def test_a_page_needs_no_other_file() -> None:
    text = page("T", [Section("S", [picture(PNG, "a dot")])])
    assert 'src="data:image/png;base64,' in text
    assert not any(outside in text for outside in ("http:", "https:", "<script", "<link"))


def test_given_text_is_escaped_everywhere() -> None:
    evil = "<script>x</script>"
    parts = [paragraph(evil), table([evil], [[evil]]), picture(PNG, evil + '"', evil)]
    text = page(evil, [Section(evil, parts)], lead=evil)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 9  # twice in the title


def test_sections_stand_in_their_order() -> None:
    text = page("T", [Section("first", [paragraph("uno")]), Section("second", [Markup("<p>two</p>")])])
    assert text.index("<h2>first") < text.index("<p>uno") < text.index("<h2>second") < text.index("<p>two</p>")


def test_columns_of_numbers_are_set_right() -> None:
    text = table(["name", "value", "change"], [["a", 1.5, "+3%"], ["b", "", "-1%"], ["c", None, "0"]])
    assert text.count('class="number"') == 8
    assert '<th>name</th><th class="number">value</th>' in text


def test_a_picture_may_be_an_svg_file(tmp_path: Path) -> None:
    path = tmp_path / "p.svg"
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    assert "data:image/svg+xml;base64," in picture(path, "nothing")
