"""Fixtures of the tests of evaluation: a converted project and a copy of it."""

from support.evaluated_members import converted, project

__all__ = ["converted", "project"]
