"""Lets ``pip install -e .`` put ``library`` and ``networks`` on the path for wrappers that import them."""

from setuptools import find_packages, setup

setup(name="library", packages=find_packages(include=["library", "library.*", "networks", "networks.*"]))
