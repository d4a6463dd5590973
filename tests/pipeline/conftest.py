"""Fixtures of the tests of pipeline: a fake host with Docker and Compose."""

from support.fakes.docker import host

__all__ = ["host"]
