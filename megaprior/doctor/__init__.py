"""`megaprior doctor`: what of a machine, a launcher, a network and its file systems would stop a run, and what to do about it."""
