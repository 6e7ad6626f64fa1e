"""Figures out: what was measured, and its tables, plots and pages."""
