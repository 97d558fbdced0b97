"""Comparisons of optimizers: recipes, their runs and reports, the demo and the audit's pages."""
