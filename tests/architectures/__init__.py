"""Which architectures of transformers can do what in Coppice: tiny models of each are run through the stages."""
