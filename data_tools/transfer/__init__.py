"""Scores of one tokenizer's tokens carried over the bytes to another's."""
