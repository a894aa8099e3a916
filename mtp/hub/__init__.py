"""Building, loading and saving models; checkpoints; exports for Hugging Face."""
