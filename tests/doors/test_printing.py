"""What strangers wrote reaches no terminal, no log and no report raw."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest
from reports.conftest import Maker, report
from sealed import write_sealed

from edgecl.cli.output import print_line, print_rows
from edgecl.config.recipe import read_recipe
from edgecl.errors import LONGEST, EdgeclError, printable, tell

# Erases the screen, sets the window's title, rings, overwrites the line, turns the letters, ends the isolate.
HOSTILE = "a\x1b[2J\x1b]0;x\x07\r\x00\x9b31m\u202eb\u2066c\u200f\u061c\udcff"


def unsafe(text):
    """The characters that may steer a terminal, by Unicode's own tables."""
    return {
        sign
        for sign in text
        if (unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t")
        or unicodedata.bidirectional(sign) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        or sign in "\u200e\u200f\u061c"
    }


def test_every_character_that_steers_a_terminal_is_escaped_and_no_other_changed():
    for code in range(sys.maxunicode + 1):
        sign = chr(code)
        shown = printable(sign)
        if unsafe(sign) or code in (0xFFFE, 0xFFFF):
            assert shown.isascii(), hex(code)
            assert shown.isprintable(), hex(code)
            assert shown.encode().decode("unicode_escape") == sign
        else:
            assert shown == sign, hex(code)


def test_an_errors_text_is_safe_in_each_of_its_parts():
    error = EdgeclError(HOSTILE, where={HOSTILE: HOSTILE}, hint=HOSTILE)
    assert unsafe(str(error)) == unsafe(str(error.args[0])) == set()
    assert "\\x1b[2J" in str(error)


def test_an_errors_text_is_bounded_and_says_by_how_much():
    error = EdgeclError("p" * 3_000_000, where={"file": "f" * 3_000_000}, hint="h" * 3_000_000)
    assert len(str(error)) < 4 * LONGEST
    assert str(error).count("2,998,000 more characters") == 3


def test_lines_and_tables_of_the_command_line_are_safe(capsys):
    print_line(HOSTILE)
    print_rows(HOSTILE, ["name", ""], [(HOSTILE, HOSTILE)])
    tell(HOSTILE)
    said = capsys.readouterr()
    assert unsafe(said.out) == unsafe(said.err) == set()
    assert "\\u202e" in said.out


def test_a_hostile_key_of_a_recipe_is_named_without_its_escapes(tmp_path, edgecl):
    file = tmp_path / "esc.toml"
    file.write_text('[host]\n"\\u001b[2J\\u001b]0;x\\u0007\\u202e" = 1\narch = "a"\n', encoding="utf-8")
    code, _, said = edgecl("cost", file)
    assert code == 1
    assert "unknown key 'host.\\x1b[2J" in said
    assert not unsafe(said)


def test_twenty_thousand_unknown_keys_make_a_short_error(tmp_path):
    file = tmp_path / "many.toml"
    file.write_text("".join(f"key{number} = 1\n" for number in range(20_000)), encoding="utf-8")
    with pytest.raises(EdgeclError, match="unknown key 'key0'") as caught:
        read_recipe(str(file))
    assert len(str(caught.value)) < 2 * LONGEST


def test_no_name_in_a_record_reaches_the_report_raw(tmp_path, edgecl):
    model = Maker().model(tmp_path / "net")
    for file in model.glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        texts = {
            key: HOSTILE
            for key in ("arch", "origin", "recipe_name", "method", "command", "data")
            if key in record
        }
        changed = {**record, **texts, HOSTILE[:-1]: HOSTILE}
        if "sha256" in record:
            write_sealed(file, changed)
        else:
            file.write_text(json.dumps(changed), encoding="utf-8")
    code, out, err = edgecl("report", model, "--out", tmp_path / "r")
    assert code == 0
    assert unsafe(out) == unsafe(err) == set()
    for name in ("report.html", "report.md", "report.json"):
        assert not unsafe((tmp_path / "r" / name).read_text(encoding="utf-8")), name
    texts = []

    def gather(value):
        if isinstance(value, dict):
            texts.extend(value)
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                gather(one)
        elif isinstance(value, str):
            texts.append(value)

    gather(report([model], out=tmp_path / "again"))
    assert any("\\x1b[2J" in text for text in texts)
    assert not unsafe("".join(texts))


@pytest.mark.parametrize(
    "words", [["verify", "a", "b\x1b[2J\u202ec"], ["\u2066verify"], ["verify", "--\u202ejson"]]
)
def test_wrong_usage_is_printable(words, edgecl):
    code, _, said = edgecl(*words)
    assert code == 2
    assert "\\u20" in said
    assert not unsafe(said)
