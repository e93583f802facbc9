"""Training a decoder, and scoring it."""
