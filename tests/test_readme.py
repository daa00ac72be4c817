"""The README's tree is the disk's tree, and its links and paths lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("actors", "feature_server", "learner", "orchestration")


def test_layout_names_every_file_with_a_phrase() -> None:
    tree = re.search(r"## Layout.*?```\n(.*?)```", README, re.DOTALL).group(1)
    named, folder = set(), ""
    for line in tree.splitlines():
        name, phrase = line.split(maxsplit=1)
        assert phrase, line
        if not line.startswith(" "):
            folder = name
        else:
            named.add(folder + name)
    on_disk = {
        f"{top}/{path.name}" + ("/" if path.is_dir() else "")
        for top in FOLDERS
        for path in (ROOT / top).iterdir()
        if path.name not in ("__init__.py", "__pycache__")
    }
    assert named == on_disk


def test_paths_and_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    table = re.findall(r"`((?:actors|feature_server|learner|orchestration)/[\w./]+?\.(?:py|toml))", README)
    tests = [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", README)]
    assert links and table and tests
    missing = [path for path in links + table + tests if not (ROOT / path).exists()]
    assert not missing


def test_equation_table_names_functions_that_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", README)
    assert named
    for path, function in named:
        assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
            path,
            function,
        )
