"""Build script; everything about the distribution is stated in pyproject.toml."""

from setuptools import setup

setup()
