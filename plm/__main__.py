"""`python -m plm`: the commands, a line each."""

import ast
import pkgutil
from pathlib import Path

import plm


def commands() -> dict[str, str]:
    """{name: first line of its docstring} of every command: a module of this package that can be run."""
    found = {}
    for module in sorted(pkgutil.iter_modules(plm.__path__), key=lambda module: module.name):
        path = Path(plm.__path__[0]) / f"{module.name}.py"
        if module.name.startswith("_") or not path.exists():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body):
            found[module.name] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


if __name__ == "__main__":
    print("python -m plm.COMMAND --help\n")
    for name, line in commands().items():
        print(f"  plm.{name:<12} {line}")
    print(f"  {'launch.sweep':<16} every point of a sweep, resumable (from a checkout)")
