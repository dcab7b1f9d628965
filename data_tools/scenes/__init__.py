"""The project's own sample: scenes of shapes, web-like captions, and the truth about every word."""
