"""Fixtures of the tests of commands: a fake machine, and a fake host with Docker and Compose."""

from support.fake_docker import host
from support.fake_machine import based_on, machine

__all__ = ["based_on", "host", "machine"]
