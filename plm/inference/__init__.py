"""A trained model in use: load, embed, score, generate, fill masks."""
