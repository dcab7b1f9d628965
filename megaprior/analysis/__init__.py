"""From scores, runs and results to figures, tables and the report."""
