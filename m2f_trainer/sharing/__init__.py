"""Passing a model on: its card, its licence chain and its upload."""
