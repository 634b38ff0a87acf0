"""Vectors into slide answers: multiple-instance learning, prototypes, slide embeddings."""
