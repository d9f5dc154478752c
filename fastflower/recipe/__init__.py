"""Recipes: the keys and their meanings, loading, checks, derived numbers, and the identity of a run."""

from fastflower.recipe.arguments import parse_command, parse_several
from fastflower.recipe.load import load, to_yaml
from fastflower.recipe.schema import Recipe, fields_of

__all__ = ["Recipe", "fields_of", "load", "parse_command", "parse_several", "to_yaml"]
