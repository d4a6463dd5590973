"""Fixtures of the tests of commands: a fake machine, and a fake host with Docker and Compose."""

from support.fakes.docker import host
from support.fakes.machine import based_on, machine

__all__ = ["based_on", "host", "machine"]
