"""The embedded texts: a folder of known files gives known pairs, and the real one gives enough of them."""

import ast
import sysconfig

import pytest

from actors.data.stdlib_source import stdlib_files, stdlib_pairs
from actors.data.texts import Pair, content_place

MODULE = '''\
class Shape:
    @staticmethod
    @cached(size=1)
    def area(side):  # side
        """Größe

        in m².
        """  # remark
        text = """
kept as it is
            """
        return side**2

    def undocumented(self):
        return 0

    def bodiless(self):
        """Only words."""

    def cramped(self): "Words."; return 1

if True:
    async def outer():
        'Outer.'
        def inner():
            ("Inner.")

            return 1
        return inner
'''


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A standard library made of the files that a test writes."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


@pytest.fixture(scope="module")
def real_pairs():
    return stdlib_pairs()


def test_pairs_are_dedented_and_cut_after_the_docstring(stdlib):
    (stdlib / "shape.py").write_text(MODULE, encoding="utf-8")
    area, outer, inner = stdlib_pairs()
    assert area == Pair(
        name="shape.py::Shape.area:4",
        prompt='@staticmethod\n@cached(size=1)\ndef area(side):  # side\n    """Größe\n\n    in m².\n    """',
        completion='  # remark\n    text = """\nkept as it is\n        """\n    return side**2',
        file_place=content_place(MODULE),
    )
    assert {area.file_place, outer.file_place, inner.file_place} == {content_place(MODULE)}
    assert outer.name == "shape.py::outer:23"
    assert outer.prompt == "async def outer():\n    'Outer.'"
    assert inner == Pair(
        name="shape.py::outer.<locals>.inner:25",
        prompt='def inner():\n    ("Inner.")',
        completion="\n\n    return 1",
        file_place=content_place(MODULE),
    )


def test_files_are_decoded_as_they_declare_and_those_that_are_not_left_out(stdlib):
    (stdlib / "latin.py").write_bytes("# coding: latin-1\nx = 'ü'\r\n".encode("latin-1"))
    (stdlib / "undecodable.py").write_bytes(b"x = '\xff'\n")
    (stdlib / "unknown.py").write_bytes(b"# coding: no-such-codec\n")
    (stdlib / "syntax.py").write_text("def f(:\n")
    (stdlib / "null.py").write_bytes(b"x = 1\0\n")
    (stdlib / "empty.py").write_text("\n")
    for folder in ("test", "pkg/tests", "site-packages/pkg", "encodings", "__pycache__", "config-3.11-linux"):
        (stdlib / folder).mkdir(parents=True)
        (stdlib / folder / "module.py").write_text("x = 1\n")
    (stdlib / "pkg" / "a.py").write_text("y = 1\n")
    assert [(text.name, text.text) for text in stdlib_files()] == [
        ("latin.py", "# coding: latin-1\nx = 'ü'\n"),
        ("null.py", "x = 1\0\n"),
        ("pkg/a.py", "y = 1\n"),
        ("syntax.py", "def f(:\n"),
    ]


def test_files_that_do_not_parse_have_no_pairs(stdlib):
    (stdlib / "shape.py").write_text(MODULE, encoding="utf-8")
    pairs = stdlib_pairs()
    (stdlib / "syntax.py").write_text(MODULE + "def f(:\n", encoding="utf-8")
    (stdlib / "null.py").write_text(MODULE + "x = 1\0\n", encoding="utf-8")
    assert len(pairs) == 3 and stdlib_pairs() == pairs


def test_tkinter_gets_one_pair_in_twenty(stdlib):
    function = 'def f{}():\n    """Words."""\n    return {}\n'
    (stdlib / "tkinter").mkdir()
    (stdlib / "tkinter" / "wrappers.py").write_text("".join(function.format(i, i) for i in range(50)))
    (stdlib / "others.py").write_text("".join(function.format(i, i) for i in range(39)))
    names = [pair.name for pair in stdlib_pairs()]
    assert sum(name.startswith("tkinter/") for name in names) == 2
    assert sum(name.startswith("others") for name in names) == 39
    assert names == sorted(names, key=lambda name: (name.partition("::")[0], int(name.rpartition(":")[2])))


def test_every_pair_is_one_function_cut_between_docstring_and_body(real_pairs):
    for pair in real_pairs:
        (head,) = ast.parse(pair.prompt).body
        (whole,) = ast.parse(pair.prompt + pair.completion).body
        assert ast.unparse(head.body) == ast.unparse(whole.body[:1]), pair.name
        assert len(head.body) == 1 < len(whole.body), pair.name
        assert pair.prompt == pair.prompt.rstrip() and pair.completion[0].isspace(), pair.name


def test_the_running_interpreter_has_enough_texts(real_pairs):
    assert 2_000 < len(real_pairs) < 20_000
    assert len({pair.name for pair in real_pairs}) == len(real_pairs)
    assert sum(pair.name.startswith("tkinter/") for pair in real_pairs) <= len(real_pairs) / 20
    files = stdlib_files()
    assert 200 < len(files) < 2_000
    assert 4_000_000 < sum(len(text.text) for text in files) < 40_000_000
    assert "argparse.py" in {text.name for text in files}
