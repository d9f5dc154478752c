"""Fixtures of the tests of evaluation: a converted project, and a copy of it to work in."""

from support.evaluated_members import converted, place

__all__ = ["converted", "place"]
