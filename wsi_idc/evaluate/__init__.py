"""Evaluation: figures with intervals over patients, plots, and one report."""
