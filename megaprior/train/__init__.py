"""One loop, two engines, checkpoints that resume exactly."""
