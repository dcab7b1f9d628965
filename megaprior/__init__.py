"""megaprior: vision-language pre-training with the PRIOR token-weighted loss.

Importing this package imports nothing heavy; the rooms inside it are described in README.md.
"""

__version__ = "0.1.0"
