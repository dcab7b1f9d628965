"""Sources of the CUDA kernels and what builds them; `megaprior.kernels.cuda_rows` is what calls them."""
