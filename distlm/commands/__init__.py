"""Verbs of the command line besides the stages, by subject: their arguments, and the function each calls."""
