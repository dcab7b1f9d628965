"""Export: a trained model as a folder that Hugging Face's programs load, checked against the trainer's own."""

from megaprior.export.writing import export

__all__ = ["export"]
