"""Builds made of builds: split, merge, replay what was refused, bring back a lost index."""
