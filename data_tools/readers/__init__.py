"""Inputs to samples: every format, record by record, streaming; what cannot be used is refused with its reason."""
