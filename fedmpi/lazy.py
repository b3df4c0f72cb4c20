"""A house's door: names that a package offers, imported when first used, so that `--help` never pays for torch."""

import importlib
from collections.abc import Callable, Mapping


def door(package: str, offers: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package that offers each name from the submodule given for it."""

    def lookup(name: str) -> object:
        if name not in offers:
            raise AttributeError(f"{package} offers no {name!r}; it offers {', '.join(sorted(offers))}")
        return getattr(importlib.import_module(f"{package}.{offers[name]}"), name)

    return lookup
