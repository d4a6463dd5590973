"""Tests of the whole product, whose fixtures are in this folder's conftest.py."""
