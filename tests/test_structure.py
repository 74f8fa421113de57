"""The two floors: imports go one way, files and functions stay short."""

import ast

import pytest
from helpers import ROOT

import plumbing

PLUMBING = plumbing.__doc__.split("before it:")[1].strip(" \n.").replace("\n", " ").split(", ")
CHAPTERS = ["costs", "sft_simulator", "train_rl", "evaluate"]
ORDER = [f"plumbing.{name}" for name in PLUMBING] + CHAPTERS
FILES = {name: ROOT / (name.replace(".", "/") + ".py") for name in ORDER}
LONGEST = {"costs": 430, "sft_simulator": 530, "train_rl": 1100, "evaluate": 700}  # a little room


def test_the_order_names_every_module():
    found = {f"plumbing.{path.stem}" for path in (ROOT / "plumbing").glob("[!_]*.py")}
    assert found == {name for name in ORDER if name.startswith("plumbing.")}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_those_before_it(name):
    imported = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    before = set(ORDER[: ORDER.index(name)])
    assert imported & set(ORDER) <= before
    assert not imported & {"plumbing"}  # a module, never the package as a whole


@pytest.mark.parametrize("name", ORDER)
def test_files_and_functions_stay_short(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST.get(name, 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 8, node.name
