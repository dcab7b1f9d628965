"""The verbs of `megaprior-data`: their arguments, their help, what they print. Nothing heavy is imported before one runs."""
