"""Prediction: instances of images without annotations."""
