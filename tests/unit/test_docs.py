"""The pages say what the program says: names, options, lifetimes, examples, links."""

import ast
import importlib.util
import os
import re
import socket
from pathlib import Path

import pytest

import fanwise
from fanwise import lab

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]
BENCH = "bench/RESULTS.md"  # written by `make bench`

_spec = importlib.util.spec_from_file_location("fanwise_docs_generate", DOCS / "_generate.py")
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)

page = pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(path, language):
    """Yield (line, text) of the fenced blocks of a language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    text = path.read_text()
    for match in fence.finditer(text):
        yield text.count("\n", 0, match.start()) + 2, match[1]


EXAMPLES = [
    pytest.param(text, id=f"{path.relative_to(ROOT)}:{line}")
    for path in PAGES
    for line, text in blocks(path, "python")
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_compile_and_their_names_exist(text):
    tree = ast.parse(text)
    compile(tree, "example", "exec")
    used = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "fanwise"
    ]
    models = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "fanwise.lab"
        for alias in node.names
    ]
    assert used or models
    assert set(used) <= {*fanwise.__all__, "health", "vfs"}
    assert set(models) <= set(lab.__all__)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_use_what_watches_and_changes_have(text):
    """By the names that the examples use for them."""
    kinds = {
        "changes": {*dir(fanwise.Watch), *dir(fanwise.AsyncWatch)},
        "change": dir(fanwise.Change),
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr in kinds.get(node.value.id, [node.attr])


def test_there_are_examples():
    assert len(EXAMPLES) > 3


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text()
    said = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", text, re.MULTILINE)
    assert sorted(said) == fanwise.__all__


def test_the_tree_of_errors_is_the_one_in_the_code():
    import fanwise._errors

    tree = [line[4:] for line in fanwise._errors.__doc__.splitlines() if "  " in line.strip()]
    assert len(tree) > 5
    assert "\n".join(tree) in (DOCS / "api.md").read_text()


@pytest.mark.parametrize("name", generate.BLOCKS)
def test_generated_parts_are_up_to_date(name):
    assert (DOCS / name).read_text() == generate.filled(name), "run docs/_generate.py"


def test_every_option_is_in_the_command_line_page():
    text = (DOCS / "cli.md").read_text()
    found = 0
    for context in generate.commands():
        assert f"### {context.command_path}\n" in text
        for parameter in context.command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert f"  {option}" in text
                found += 1
    assert found > 10


def test_every_lifetime_is_in_its_page():
    text = (DOCS / "lifetimes.md").read_text()
    assert generate.lifetimes()
    for where, lifetime in generate.lifetimes().items():
        assert where in text
        assert lifetime.render_markdown() in text
        assert lifetime.render_mermaid() in text


@page
def test_no_page_names_this_machine(path):
    text = path.read_text()
    assert not re.search(r"/(?:home|root|tmp|work|Users|nix)/", text)
    # A host may be called "watch"; what looks like no word is looked for.
    for word in (socket.gethostname(), os.uname().release):
        if re.search(r"[-.]", word) and re.search(r"\d", word):
            assert word not in text


@page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in target and target != BENCH:
            assert (path.parent / target).exists(), target


def test_every_page_is_in_a_table_of_contents():
    listed = {
        (index.parent / f"{line.strip()}.md").resolve()
        for index in (DOCS / "index.md", DOCS / "adr/index.md")
        for _, block in blocks(index, r"\{toctree\}")
        for line in block.splitlines()
        if line.strip() and not line.startswith(":")
    }
    assert {*listed, DOCS / "index.md"} == {p for p in PAGES if p.parent != ROOT}


@page
def test_fences_are_closed(path):
    assert path.read_text().count("```") % 2 == 0


def test_make_targets_are_described():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r'@echo "make (.*)"', makefile)[1].split(" | ")
    text = (DOCS / "development.md").read_text()
    for target in targets:
        assert f"| `make {target}` |" in text


@page
def test_files_that_are_named_exist(path):
    for name in re.findall(
        r"`((?:tests|docs|src|bench|demo|requirements)/[\w./-]*)`", path.read_text()
    ):
        assert (ROOT / name).exists() or name in (BENCH, "docs/_build"), name


def test_the_cases_of_unknowable_order_are_told_alike():
    import fanwise.names.verify as verify

    def cases(text):
        return sorted(set(re.findall(r"^(?:- )?(?:\*\*)?(\([a-z]\))", text, re.MULTILINE)))

    assert cases(verify.__doc__) == ["(a)", "(b)", "(c)"]
    for name in ("guarantees.md", "adr/0003-order-after-merging.md"):
        assert cases((DOCS / name).read_text()) == cases(verify.__doc__), name
