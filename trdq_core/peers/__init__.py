"""Other tools on the same model, latents and embeddings: each converts a copy of the denoiser. Their packages load when used."""
