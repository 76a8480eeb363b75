"""How checkpoints lie on disk: LLaVA's own layout and Hugging Face's. Shared by the systems."""
