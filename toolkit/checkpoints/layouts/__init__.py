"""Checkpoint layouts: LLaVA's own and Hugging Face's, shared by the systems that use them."""
