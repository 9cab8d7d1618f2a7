import argparse
import inspect
import textwrap
import zipfile

import pytest

from normfree.tasks.functions import Function, functions_of


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [inspect.getsource(module) for module in (argparse, inspect, textwrap, zipfile)]


@pytest.fixture(scope="session")
def functions(documents: list[str]) -> list[Function]:
    return functions_of(documents)
