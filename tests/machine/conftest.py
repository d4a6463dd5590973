"""Fixtures of the tests of machine: a fake machine, and recipes on other bases."""

from support.fake_machine import based_on, machine

__all__ = ["based_on", "machine"]
