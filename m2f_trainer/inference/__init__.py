"""A trained model at work on images without annotations."""
