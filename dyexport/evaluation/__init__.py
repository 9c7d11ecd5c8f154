"""Scores of what a bundle samples, against its dense network and against real data."""
