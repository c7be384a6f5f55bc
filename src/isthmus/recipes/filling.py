"""What the command line puts into a recipe: values at dotted keys, and the variables that it leaves open."""

import re
from collections.abc import Mapping

from isthmus.errors import ConfigError, nearest


def set_key(tree: dict[str, object], key: str, value: object, *, where: str) -> None:
    """Set a dotted key; a list is entered by number or by the ``name`` of its member."""
    steps = key.split(".")
    node: object = tree
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(node, list):
            names = [str(m.get("name")) if isinstance(m, dict) else "" for m in node]
            if step.isdigit() and int(step) < len(node):
                index = int(step)
            elif step in names:
                index = names.index(step)
            else:
                known = [n for n in names if n] or [str(i) for i in range(len(node))]
                raise ConfigError(f"Recipe {where} has no {'.'.join(steps[: depth + 1])!r}; {nearest(step, known)}")
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[step] = value
            elif not isinstance(node.get(step), dict | list):
                node[step] = {}
            node = node[step]
        else:
            raise ConfigError(f"Recipe {where}: {'.'.join(steps[:depth])!r} is a value and has no {step!r} in it.")


VARIABLE = re.compile(r"\{([A-Z][A-Z0-9_]*)\}")
"""``{DATA}``: what the user fills in."""


def mentioned(tree: object) -> set[str]:
    """The variables that stand in any of the tree's strings."""
    if isinstance(tree, str):
        return set(VARIABLE.findall(tree))
    members = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return set().union(*(mentioned(m) for m in members)) if members else set()


def demand(tree: object, variables: Mapping[str, str], about: Mapping[str, object], where: str) -> None:
    """Raises ConfigError for a variable that was not given, with what the recipe says about it."""
    for name in sorted(mentioned(tree) - set(variables)):
        what = f" ({about[name]})" if name in about else ""
        raise ConfigError(f"Recipe {where} needs {name}{what}: add {name}=PATH to the command.")


def fill(tree: object, variables: Mapping[str, str]) -> object:
    """The tree with the given variables put in, in all its strings."""
    if isinstance(tree, str):
        return VARIABLE.sub(lambda m: variables.get(m.group(1), m.group(0)), tree)
    if isinstance(tree, dict):
        return {k: fill(v, variables) for k, v in tree.items()}
    if isinstance(tree, list):
        return [fill(v, variables) for v in tree]
    return tree
